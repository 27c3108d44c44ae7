"""The understanding tower: the official outputs, an independent implementation, and what is trained of it."""

import copy
import math
import re

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from trl_unigrpo.models.bagel import BagelConfig, BagelForUnifiedGeneration
from trl_unigrpo.models.bagel.vision import UNDERSTANDING_MODULES, BagelVisionTower, patchify


TOLERANCE = 1e-5  # of max(1, largest recorded entry)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))


def pixels_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_recorded_image(model, recorded):
    pixels = recorded["und/pixel_values"]
    assert torch.equal(patchify(pixels, 14), recorded["und/vit_patches"])
    features = model.vit_model(pixels)
    assert_close(features, recorded["und/vit_features"])
    assert_close(model.connector(features), recorded["und/connector_out"])
    assert_close(model.embed_vit_image(pixels), recorded["und/image_embeds"])


def test_patches_by_hand():
    """Two patches of 2 x 2 pixels side by side; a number says channel, row and column."""
    pixels = torch.tensor(
        [[[100 * c + 10 * row + column for column in range(4)] for row in range(2)] for c in range(3)]
    )
    first = [0, 100, 200, 1, 101, 201, 10, 110, 210, 11, 111, 211]
    second = [2, 102, 202, 3, 103, 203, 12, 112, 212, 13, 113, 213]
    assert patchify(pixels, 2).tolist() == [first, second]
    assert patchify(torch.stack([pixels, -pixels]), 2)[1].tolist() == [[-x for x in first], [-x for x in second]]


@torch.no_grad()
def test_tower_is_siglips_on_a_square_image():
    """transformers' SigLIP, with a convolution for its patches and a table of exactly this grid."""
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3, "patch_size": 4, "image_size": 20}
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, num_hidden_layers=2, vision_use_head=False)).eval()
    for parameter in siglip.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower = BagelVisionTower(SiglipVisionConfig(**sizes, num_hidden_layers=3), side=5).eval()
    weights = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": x
        for name, x in siglip.state_dict().items()
    }
    name = "vision_model.embeddings.patch_embedding.weight"
    weights[name] = weights[name].permute(0, 2, 3, 1).flatten(1)  # (W, row, column, channel)
    tower.load_state_dict(weights)
    pixels = pixels_of(2, 3, 20, 20)
    assert_close(tower(pixels), siglip(pixels).last_hidden_state)


@torch.no_grad()
def test_place_of_a_patch_is_its_row_and_column(model):
    """Features of a patch alone depend on its place; the table has 70 places a row, whatever the image's width."""
    tower, table = model.vit_model, model.vit_model.vision_model.embeddings.position_embedding
    positions = []
    table.register_forward_hook(lambda module, inputs, output: positions.append(inputs[0]))
    tower(pixels_of(3, 28, 42))
    assert positions[0].tolist() == [0, 1, 2, 70, 71, 72]


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(model):
    pixels = pixels_of(3, 3, 42, 28)
    together = model.embed_vit_image(pixels)
    assert together.shape == (3, 6, 64)
    assert_close(together, torch.stack([model.embed_vit_image(image) for image in pixels]))


@torch.no_grad()
def test_embedding_follows_the_models_dtype(model):
    pixels = pixels_of(3, 42, 56)
    exact, half = model.embed_vit_image(pixels), model.to(torch.bfloat16).embed_vit_image(pixels)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()


@pytest.mark.parametrize("size", [(42, 57), (0, 14), (14, 994)])
def test_size_that_the_tower_cannot_read(model, size):
    with pytest.raises(
        ValueError, match=rf"can't read an image of {size[0]} x {size[1]} pixels.*multiple of 14, at most 980\. `Bag"
    ):
        model.embed_vit_image(torch.zeros(3, *size))


def test_largest_image_is_the_last_row_of_the_table(model):
    grid = model.vit_model.grid(torch.empty(3, 980, 980))
    assert grid == (70, 70)
    assert model.vit_pos_embed(grid).shape == (4900, 64)


def test_model_without_tower_says_so(model):
    config = copy.deepcopy(model.config)
    config.vit_config = None
    blind = BagelForUnifiedGeneration(config)
    assert not any(name.startswith(UNDERSTANDING_MODULES) for name in blind.state_dict())
    with pytest.raises(ValueError, match=r"can't read images.*Load a checkpoint that holds `vit_model`"):
        blind.embed_vit_image(pixels_of(3, 14, 14))


def test_positions_beyond_the_table_are_refused(model):
    vit = model.config.vit_config.to_dict()
    with pytest.raises(ValueError, match=r"vit_max_num_patch_per_side=71, but vit_config has places for 70 patches"):
        BagelConfig(vit_config=vit, vit_max_num_patch_per_side=71)


@pytest.mark.parametrize("loaded", [True, False])
def test_frozen_unless_asked(model, loaded):
    model = model if loaded else BagelForUnifiedGeneration(model.config)
    names = {name for name, p in model.named_parameters() if name.startswith(UNDERSTANDING_MODULES)}
    assert len(names) == 3 + 2 * 16 + 2 + 4
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == names
    assert not model.embed_vit_image(pixels_of(3, 28, 28)).requires_grad
    model.freeze_understanding(False)
    assert all(p.requires_grad for p in model.parameters())
    model.embed_vit_image(pixels_of(3, 28, 28)).square().mean().backward()
    assert all(model.get_parameter(name).grad is not None for name in names)


def test_belongs_to_the_text_expert_and_gets_no_adapters(model):
    names = [name for name, _ in model.named_modules() if name.startswith(UNDERSTANDING_MODULES)]
    assert len(names) > 20
    for experts in ("text", "image", "both"):
        assert not any(re.fullmatch(model.default_lora_targets(experts), name) for name in names)
    assert not any(model.is_image_parameter(name) for name in names)


def test_random_tower_keeps_its_inputs_apart(model):
    """Norms start at one and zero, the fixed table at sines and cosines: sums of squares are half the width."""
    fresh = BagelForUnifiedGeneration(model.config)
    norm = fresh.vit_model.vision_model.encoder.layers[0].layer_norm1
    assert (norm.weight == 1).all() and (norm.bias == 0).all()
    torch.testing.assert_close(fresh.vit_pos_embed.pos_embed.square().sum(1), torch.full((4900,), 64 / 2))
    assert math.isfinite(fresh.embed_vit_image(pixels_of(3, 28, 28)).sum().item())
