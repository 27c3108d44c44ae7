"""The independent score of images: FID's formula against scipy, and its order on images of known quality."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from trl_unigrpo.evaluation import Guidance
from trl_unigrpo.shapeworld import evaluate_model, load_base, shapeworld_dataset
from trl_unigrpo.shapeworld.quality import (
    clean_drawings,
    frechet_distance,
    image_tokens,
    latent_distance,
)
from trl_unigrpo.shapeworld.verifier import images_to_array, shapeworld_reward


PROMPTS = list(shapeworld_dataset("test", 140, seed=3)["prompt"])


@pytest.fixture(scope="module")
def base():
    return load_base()


def closed_form(mean_a, cov_a, mean_b, cov_b):
    return np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)


def points(rng, mean, covariance, number):
    """Points whose sample mean and covariance are exactly these."""
    x = rng.normal(size=(number, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T
    return x @ np.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("dims", [1, 2, 8])
def test_frechet_distance_is_the_closed_form_of_gaussians(dims):
    rng = np.random.default_rng(dims)
    means = rng.normal(size=(2, dims))
    covariances = [a @ a.T + 0.1 * np.eye(dims) for a in rng.normal(size=(2, dims, dims))]
    a, b = (points(rng, mean, covariance, 50 + dims) for mean, covariance in zip(means, covariances, strict=True))
    expected = closed_form(means[0], covariances[0], means[1], covariances[1])
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2.0) == pytest.approx(4.0 * dims, rel=1e-8)


def test_frechet_distance_of_flat_sets():
    """A singular covariance, as of images of one colour, is no special case."""
    a = np.random.default_rng(0).normal(size=(60, 3)) * [1.0, 2.0, 0.0]
    assert frechet_distance(a, 2 * a) == pytest.approx(np.square(a.mean(0)).sum() + np.trace(np.cov(a.T)), rel=1e-6)
    with pytest.raises(ValueError, match="two of each"):
        frechet_distance(a[:1], a)


def test_clean_drawings_are_clean_and_as_asked():
    drawings = clean_drawings(PROMPTS)
    asked = [prompt for prompt in PROMPTS for _ in range(10)]
    assert shapeworld_reward(asked, [""] * len(asked), drawings) == [1.0] * len(asked)
    assert len({drawing.tobytes() for drawing in drawings}) > 0.5 * len(drawings)


def test_clean_images_are_near_and_noise_moves_away(base):
    model, _ = base
    clean = clean_drawings(PROMPTS, seed=1)[::10]
    latents = model.encode_images(torch.from_numpy(images_to_array(clean)))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = [model.decode_latents(latents + std * noise, (48, 48)) for std in (0.2, 0.4, 0.8)]
    distances = [latent_distance(model, images, PROMPTS) for images in (clean, *noisy)]
    assert distances == sorted(distances)
    assert distances[0] < 0.005 and distances[-1] > 0.03
    assert latent_distance(model, [clean[0]] * 20, PROMPTS) > 0.1  # clean, but always the same


def test_tokens_are_those_of_the_autoencoder(base):
    model, _ = base
    clean = clean_drawings(PROMPTS[:2])
    tokens = image_tokens(model, clean)
    assert tokens.shape == (20 * 9, 8)
    expected = model.encode_images(torch.from_numpy(images_to_array(clean)))[3, 4].double()
    torch.testing.assert_close(torch.from_numpy(tokens[3 * 9 + 4]), expected)


def test_guidance_reaches_the_images(base):
    plain, one, guided = (
        evaluate_model(*base, num_prompts=7, guidance=guidance) for guidance in (None, Guidance(1.0), Guidance(3.0))
    )
    assert plain.thinking == guided.thinking
    torch.testing.assert_close(plain.latents, one.latents)
    assert (plain.latents - guided.latents).abs().max() > 0.05
