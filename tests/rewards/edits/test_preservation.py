"""Parts that should stay in an edit, measured on images whose difference is known."""

import numpy as np
import pytest
from PIL import Image

from trl_unigrpo.rewards import ConsistencyReward, preserve, preserve_structure


def gray(value, size=(16, 16)):
    return Image.new("RGB", size, (value,) * 3)


def pattern():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def half(left, right):
    """An image of two halves."""
    image = gray(left)
    image.paste((right,) * 3, (8, 0, 16, 16))
    return image


RIGHT = half(0, 255)


def test_absolute_difference_of_what_should_stay():
    images, sources = [gray(100), gray(151), half(100, 255)], [[gray(100)], gray(100), [gray(100), gray(0)]]
    arguments = {"prompts": [""] * 3, "images": images, "source_images": sources}
    assert preserve(**arguments) == pytest.approx([1, 0.8, 1 - 155 / 255 / 2])
    assert preserve(**arguments, mask=[None, RIGHT, RIGHT]) == pytest.approx([1, 0.8, 1])
    assert preserve(**arguments, mask=[np.ones((16, 16)), None, np.zeros((4, 4))])[0] is None


def test_a_source_of_another_size_is_resized():
    assert preserve([""], [gray(100, (8, 4))], [[gray(100, (32, 16))]]) == [1]


@pytest.mark.parametrize(
    ("sources", "message"), [([], "Got 0 images for 1 prompts"), ([["no image"]], "Got an image of type str")]
)
def test_sources_have_to_be_there(sources, message):
    with pytest.raises((TypeError, ValueError), match=message):
        preserve([""], [gray(0)], sources)


def test_structure_of_what_should_stay():
    metrics = pytest.importorskip("skimage.metrics")
    image, changed = pattern(), half(100, 255)
    changed.paste(image.crop((0, 0, 8, 16)), (0, 0))
    same, other = preserve_structure(["", ""], [image, changed], [[image], [image]])
    wanted = metrics.structural_similarity(np.asarray(image), np.asarray(changed), channel_axis=2, full=True)[1]
    assert (same, other) == (pytest.approx(1), pytest.approx(wanted.mean()))
    (kept,) = preserve_structure([""], [changed], [[image]], mask=[RIGHT])
    assert kept == pytest.approx(wanted[:, :8].mean())
    assert kept > other
    assert preserve_structure([""], [gray(0, (6, 20))], [[gray(0)]]) == [None]


def test_each_image_of_a_story_is_held_against_the_one_before():
    reward = ConsistencyReward()
    images = [gray(151), gray(202), half(100, 255), gray(0)]
    given = {
        "previous_images": [[gray(0), gray(100)], [], [gray(100)], []],
        "source_images": [[gray(7)], [gray(151), gray(0)], [gray(0)], None],
        "round_index": [2, 0, 1, 0],
    }
    assert reward([""] * 4, images, **given) == pytest.approx([0.8, 0.8, 1 - 155 / 255 / 2, None])
    # In the third row the second turn belongs to the right half.
    masks = [None, None, [half(255, 0), RIGHT], None]
    assert reward([""] * 4, images, **given, masks=masks)[2] == 1
    assert reward([""] * 4, images, **{**given, "round_index": [2, 0, 0, 0]}, masks=masks)[2] == pytest.approx(
        100 / 255
    )
    assert reward(["", ""], images[:2], source_images=given["source_images"][:2]) == pytest.approx(
        [1 - 144 / 255, 0.8]
    )
    assert reward([""], images[:1]) == [None]


def test_consistency_by_structure():
    pytest.importorskip("skimage.metrics")
    image = pattern()
    reward = ConsistencyReward(preserve_structure)
    same, other = reward(["", ""], [image, gray(90)], previous_images=[[gray(0), image], [image]])
    assert same == pytest.approx(1)
    assert other < 0.2
