"""Image statistics against images whose numbers are known."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trl_unigrpo.monitoring.image_statistics import image_statistics, near_twins, noise_residual


def gray(values):
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8)).convert("RGB")


def test_shares_of_dark_and_bright():
    values = np.full((512, 512), 100)
    values[:128] = 40  # a quarter of the rows below 63.75
    values[-64:] = 200  # an eighth above 191.25
    found = image_statistics(gray(values))
    assert found.dark_share == 0.25
    assert found.bright_share == 0.125


def test_entropy_of_colours_that_are_known():
    assert image_statistics(Image.new("RGB", (512, 512), "teal")).color_entropy == 0
    colors = [(r, g, b) for r in (16, 240) for g in (16, 240) for b in (16, 240)]
    blocks = np.array(colors, dtype=np.uint8).reshape(2, 4, 3).repeat(256, 0).repeat(128, 1)
    assert image_statistics(Image.fromarray(blocks)).color_entropy == pytest.approx(3)
    steps = np.arange(16, 256, 32).repeat(64)  # one grey of each of the eight steps
    assert image_statistics(gray(np.tile(steps, (512, 1)))).color_entropy == pytest.approx(3)
    seven_eighths = np.zeros((512, 512, 3), dtype=np.uint8)
    seven_eighths[:64] = 255
    expected = -(7 / 8 * math.log2(7 / 8) + 1 / 8 * math.log2(1 / 8))
    assert image_statistics(Image.fromarray(seven_eighths)).color_entropy == pytest.approx(expected)


def test_edges_of_stripes():
    stripes = np.zeros((128, 128))
    stripes[:, ::8] = 255  # each of the 16 white columns has an edge on either side, the first on one
    assert image_statistics(gray(stripes)).edge_density == pytest.approx(31 / 127)
    assert image_statistics(gray(np.tile(np.arange(128), (128, 1)))).edge_density == 0  # a slope


@pytest.mark.parametrize("sigma", [4, 12])
def test_noise_is_recovered_whatever_lies_below_it(sigma):
    random = np.random.default_rng(0)
    slope = 60 + np.add.outer(np.arange(512) / 8, np.arange(512) / 8)
    slope[:, 256:] += 40  # an upright edge
    assert noise_residual(gray(slope + random.normal(0, sigma, slope.shape))) * 255 == pytest.approx(sigma, rel=0.02)
    assert noise_residual(gray(slope)) * 255 < 0.5


def test_thumbnails_are_the_means_of_blocks():
    values = np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8)
    blocks = values.reshape(8, 64, 8, 64, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(image_statistics(Image.fromarray(values)).thumbnail, blocks.flatten(), atol=1.5 / 255)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8), (130, 700), (1024, 1024)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_size_and_mode(size, mode):
    found = image_statistics(Image.new("RGB", size, "white").convert(mode))
    assert (found.dark_share, found.bright_share, found.color_entropy) == (0, 1, 0)
    assert (found.edge_density, found.noise) == (0, 0)
    assert found.thumbnail.shape == (192,) and (found.thumbnail == 1).all()


def scene(seed, size=256):
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = random.integers(0, size, 3).tolist()
        draw.ellipse((x, y, x + r // 2, y + r // 2), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def compressed(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file)


def test_twins_are_copies_and_not_relatives():
    scenes = [scene(seed) for seed in range(6)]
    moved = Image.new("RGB", scenes[5].size)
    moved.paste(scenes[5], (40, 0))
    images = [*scenes, compressed(scenes[0]), scenes[1].resize((64, 64)), moved]
    thumbnails = np.stack([image_statistics(image).thumbnail for image in images])
    own, across = near_twins(thumbnails, [0, 1, 2, 3, 4, 5, 0, 7, 5])
    assert own.tolist() == [True, False, False, False, False, False, True, False, False]
    assert across.tolist() == [False, True, False, False, False, False, False, True, False]
    grays = np.stack([image_statistics(gray(np.full((64, 64), value))).thumbnail for value in (100, 104, 110)])
    assert near_twins(grays, [0, 0, 0])[0].tolist() == [True, True, False]
