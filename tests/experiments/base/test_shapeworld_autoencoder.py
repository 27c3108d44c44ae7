"""The patch autoencoder, and its training on ShapeWorld."""

import inspect

import numpy as np
import pytest
import torch

from trl_unigrpo.experiments.base.train_autoencoder import evaluate_autoencoder, random_cells, train_autoencoder
from trl_unigrpo.models import patch_autoencoder
from trl_unigrpo.models.patch_autoencoder import PatchAutoencoderKL
from trl_unigrpo.shapeworld.render import render_tensor


@pytest.fixture(scope="module")
def trained():
    return train_autoencoder(steps=200, batch_size=16, learning_rate=6e-3)


def test_shapes_and_interface():
    vae = PatchAutoencoderKL()
    assert vae.spatial_compression_ratio == 16
    assert vae.config.latent_channels == 8
    posterior = vae.encode(torch.zeros(2, 3, 48, 64)).latent_dist
    assert posterior.mode().shape == posterior.sample().shape == (2, 8, 3, 4)
    assert vae.decode(posterior.mode()).sample.shape == (2, 3, 48, 64)
    assert vae.decode(posterior.mode(), return_dict=False)[0].shape == (2, 3, 48, 64)
    assert vae.encode(torch.zeros(1, 3, 16, 16), return_dict=False)[0].mean.shape == (1, 8, 1, 1)
    assert vae(torch.zeros(1, 3, 16, 32)).sample.shape == (1, 3, 16, 32)


def test_other_sizes():
    vae = PatchAutoencoderKL(1, 2, latent_channels=5, block_out_channels=(6, 7), strides=(3, 2))
    assert vae.spatial_compression_ratio == 6
    z = vae.encode(torch.zeros(1, 1, 12, 18)).latent_dist.mode()
    assert z.shape == (1, 5, 2, 3)
    assert vae.decode(z).sample.shape == (1, 2, 12, 18)
    mixed = PatchAutoencoderKL(block_out_channels=(4, 5, 6), strides=(2, 3, 5))
    convolutions = [layer for layer in mixed.decoder if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert [(layer.in_channels, layer.stride[0]) for layer in convolutions] == [(6, 5), (5, 3), (4, 2)]
    one = PatchAutoencoderKL(block_out_channels=(6,), strides=(8,))
    assert one(torch.zeros(1, 3, 8, 16)).sample.shape == (1, 3, 8, 16)


def test_encoder_sees_one_patch_only():
    vae = PatchAutoencoderKL()
    images = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[:, :, 16:32, 32:48] += 1
    difference = (vae.encode(images).latent_dist.mode() - vae.encode(changed).latent_dist.mode()).abs().amax((0, 1))
    assert (difference > 0).nonzero().tolist() == [[1, 2]]


def test_refusals():
    with pytest.raises(ValueError, match="40 x 48 pixels"):
        PatchAutoencoderKL().encode(torch.zeros(1, 3, 40, 48))
    with pytest.raises(ValueError, match="same length"):
        PatchAutoencoderKL(strides=(4, 4))


@pytest.mark.slow
def test_saved_and_loaded(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = PatchAutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == trained.config.scaling_factor != 1
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(loaded(images).sample, trained(images).sample)


def test_training_beats_no_training_and_a_blank(trained):
    untrained, report = evaluate_autoencoder(PatchAutoencoderKL(), 64), evaluate_autoencoder(trained, 64)
    images = render_tensor(random_cells(np.random.default_rng(1), 64))
    blank = (images - render_tensor(np.zeros(9, dtype=np.int64))).square().mean().item()
    assert report.pixel_error < 0.5 * blank < untrained.pixel_error
    assert report.cell_accuracy > 0.4 > untrained.cell_accuracy
    assert report.noisy_cell_accuracy[0.5] <= report.cell_accuracy


def test_scaled_latents_have_unit_variance(trained):
    images = render_tensor(random_cells(np.random.default_rng(9), 512))
    with torch.no_grad():
        z = trained.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
    scaled = trained.config.scaling_factor * (z - trained.config.shift_factor)
    assert abs(scaled.mean().item()) < 0.05
    assert scaled.std().item() == pytest.approx(1, abs=0.05)


def test_training_is_deterministic_and_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    one, same, other = (train_autoencoder(steps=3, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert one.config.scaling_factor == same.config.scaling_factor


def test_random_scenes_cover_everything():
    cells = random_cells(np.random.default_rng(0), 4000)
    assert np.unique(cells).tolist() == list(range(31))
    np.testing.assert_allclose((cells > 0).mean(0), 0.5, atol=0.05)
    assert set(np.unique((cells > 0).sum(1))) == set(range(10))


def test_the_autoencoder_knows_no_world():
    assert "shapeworld" not in inspect.getsource(patch_autoencoder).lower()
