"""The forms in which a user may write sizes of images."""

import doctest

import numpy as np
import pytest

from trl_unigrpo import image_sizes
from trl_unigrpo.image_sizes import plain_size, read_size, read_sizes, read_square


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (512, [(512, 512)]),
        ("512", [(512, 512)]),
        (512.0, [(512, 512)]),
        (np.int64(512), [(512, 512)]),
        ([512], [(512, 512)]),
        ((384, 640), [(384, 640)]),
        ([384, 640], [(384, 640)]),
        (["384", "640"], [(384, 640)]),
        ("384x640", [(384, 640)]),
        (["384X640"], [(384, 640)]),
        ([[384, 640]], [(384, 640)]),
        ([[512, 512], (384, 640)], [(512, 512), (384, 640)]),
        (["512x512", "384x640", "512x512"], [(512, 512), (384, 640), (512, 512)]),
    ],
)
def test_forms(given, sizes):
    assert read_sizes(given) == sizes
    assert read_sizes([plain_size(size) for size in sizes] if len(sizes) == 1 else [list(s) for s in sizes]) == sizes


@pytest.mark.parametrize(
    "given",
    [0, -8, 0.5, True, None, "big", "", "x", "8x", "8x8x8", [], [8, 8, 8], [[8, 8], 16], ["8x8", "16"], [[8, 0]]]
    + [[[8, 8, 8], [8, 8]], [0, 8], float("inf"), float("nan"), {"height": 8}],
)
def test_what_is_no_size_is_named_with_the_forms(given):
    with pytest.raises(ValueError, match=r"eval_image_size=.*: expected the side of a square such as 512, height"):
        read_sizes(given, "eval_image_size")


def test_one_size_and_squares():
    assert read_size("384x640") == (384, 640)
    with pytest.raises(ValueError, match=r"image_size=\['8x8', '4x8'\]: expected one size here"):
        read_size(["8x8", "4x8"])
    assert read_square("512x512") == 512
    with pytest.raises(ValueError, match=r"image_size='384x640' with source images.*of as many pixels, such as 496"):
        read_square("384x640")
    with pytest.raises(ValueError, match=r"image_size=\['8x8', '4x8'\] with source images: an edited image has"):
        read_square(["8x8", "4x8"])


def test_examples():
    assert doctest.testmod(image_sizes) == (0, 3)
