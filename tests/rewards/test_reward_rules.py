"""The rewards without a model, against closed forms."""

import numpy as np
import pytest
from PIL import Image

from trl_unigrpo.rewards import (
    jpeg_size,
    sharpness,
    think_format,
    thinking_length,
)
from trl_unigrpo.rewards.rules import length_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a\nplan</think> answer", 1.0),
        ("<think>a plan</think>", 1.0),
        ("a plan</think>", 0.0),
        ("<think>a plan", 0.0),
        ("<think>a <think>plan</think>", 0.0),
        ("a plan", 0.0),
    ],
)
def test_format_of_texts_and_conversations(text, score):
    assert think_format(completions=[text], prompts=["x"]) == [score]
    assert think_format(completions=[[{"role": "assistant", "content": text}]]) == [score]


@pytest.mark.parametrize(
    ("length", "score"),
    [(0, 0), (10, 0), (15, 0.5), (20, 1), (30, 1), (40, 1), (42, 0.8), (49, 0.1), (50, 0), (900, 0)],
)
def test_length_between_soft_bounds(length, score):
    assert length_score(length, 20, 40, 10) == pytest.approx(score)


def test_length_with_hard_bounds():
    assert [length_score(n, 20, 40, 0) for n in (19, 20, 40, 41)] == [0, 1, 1, 0]


def test_thinking_length_counts_tokens():
    reward = thinking_length(2, 3, margin=2)
    assert reward(prompts=["a"] * 4, completion_ids=[[], [7], [7, 7], [7] * 4]) == [0, 0.5, 1, 0.5]
    assert reward.__name__ == "thinking_length"
    for bounds in ((3, 2, 0), (-1, 2, 0), (1, 2, -1)):
        with pytest.raises(ValueError, match=f"low={bounds[0]}, high={bounds[1]}, margin={bounds[2]}: expected"):
            thinking_length(*bounds)


def gray(pixels) -> Image.Image:
    return Image.fromarray(np.asarray(pixels, dtype=np.uint8))


def test_sharpness_in_closed_form():
    y, x = np.mgrid[:12, :16]
    checkers = gray(255 * ((x + y) % 2))  # its Laplacian is 4 · 255, alternating in sign
    ramp = gray(10 * x)  # linear: its Laplacian is 0
    parabola = gray(x**2)  # its Laplacian is 2 everywhere: no variance
    point = np.zeros((5, 5))
    point[2, 2] = 100  # 9 inner pixels: -400 once, 100 four times, 0 four times
    scores = sharpness(prompts=["a"] * 4, images=[checkers, ramp, parabola, gray(point)])
    assert scores == pytest.approx([1020.0**2, 0, 0, (400**2 + 4 * 100**2) / 9])


def test_sharpness_reads_brightness_and_skips_what_is_too_small():
    image = Image.new("RGB", (8, 8), (200, 10, 60))
    image.paste((10, 90, 60), (3, 3, 5, 5))
    assert sharpness(prompts=["a"], images=[image]) == sharpness(prompts=["a"], images=[image.convert("L")])
    assert sharpness(prompts=["a"] * 2, images=[Image.new("RGB", (2, 9)), Image.new("RGB", (9, 2))]) == [None, None]


def test_jpeg_size_is_the_files(tmp_path):
    noise = gray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    flat = Image.new("RGB", (64, 64), "green")
    for name, image in (("noise", noise), ("flat", flat)):
        image.save(tmp_path / f"{name}.jpg", quality=95)
    expected = [(tmp_path / f"{name}.jpg").stat().st_size / 1000 for name in ("noise", "flat")]
    assert jpeg_size(prompts=["a"] * 2, images=[noise, flat]) == expected
    assert expected[0] > 4 * expected[1]


@pytest.mark.parametrize("reward", [sharpness, jpeg_size])
def test_images_are_checked(reward):
    with pytest.raises(ValueError, match="Got 0 images for 2 prompts"):
        reward(prompts=["a", "b"])
