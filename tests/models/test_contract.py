"""The contract's own parts, on the tiny BAGEL: adapters, reference model, third-party models."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.painting import steps_of, trajectory
from tests.helpers.toy_painter import toy_painter
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.flow.states import columns
from trl_unigrpo.images import has_failed
from trl_unigrpo.models.contract import ContextRow, UnifiedOutput
from trl_unigrpo.sampling import decode, paint
from trl_unigrpo.trajectory import Image


IDS = torch.tensor([[375, 10, 11, 12, 376]])
SIZE = (32, 48)
LAYER = r"language_model\.model\.layers\.[0-3]\."


def lora(experts: str, model, **kwargs) -> LoraConfig:
    # Not the default start, where an adapter changes nothing.
    return LoraConfig(r=2, target_modules=model.default_lora_targets(experts), init_lora_weights=False, **kwargs)


def outputs(model) -> list[torch.Tensor]:
    """Logits and velocities: what text and image expert compute."""
    with torch.no_grad():
        context = model.encode_context([ContextRow(IDS[0])])
        latents = torch.linspace(-1, 1, 6 * 64).view(1, 6, 64)
        return [model(IDS).logits, model.predict_velocity(context, latents, torch.tensor([0.5]), SIZE)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# LoRA targets


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("experts", "pattern", "count"),
    [
        ("text", LAYER + r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)", 28),
        ("image", LAYER + r"(self_attn\.[qkvo]_proj_moe_gen|mlp_moe_gen\.(gate|up|down)_proj)", 28),
        ("both", LAYER + r"(self_attn\.[qkvo]_proj(_moe_gen)?|mlp(_moe_gen)?\.(gate|up|down)_proj)", 56),
    ],
)
def test_lora_targets_hit_exactly_the_experts(model, experts, pattern, count, wrapped):
    expected = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    assert len(expected) == count
    if wrapped:  # found around the layers of another adapter too
        adapted = get_peft_model(model, lora("both", model), adapter_name="first")
        adapted.add_adapter("own", lora(experts, model))
    else:
        adapted = get_peft_model(model, lora(experts, model), adapter_name="own")
    own = {name.removeprefix("base_model.model.") for name, _ in adapted.named_parameters() if ".own." in name}
    assert {name.split(".lora_")[0] for name in own} == expected
    assert len(own) == 2 * count
    kinds = {"text": {False}, "image": {True}, "both": {False, True}}
    assert {model.is_image_parameter(name) for name in own} == kinds[experts]


def test_lora_targets_of_unknown_experts(model):
    with pytest.raises(ValueError, match=r"experts='vision': expected one of \['both', 'image', 'text'\]"):
        model.default_lora_targets("vision")


def test_lora_of_one_expert_leaves_the_other_alone(model):
    before = outputs(model)
    get_peft_model(model, lora("image", model))
    logits, velocity = outputs(model)
    assert torch.equal(logits, before[0])
    assert (velocity - before[1]).abs().max() > 1e-3


def test_wrapped_model_generates_with_its_adapters(model):
    adapted = get_peft_model(model, lora("both", model))
    arguments = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 374, "eos_token_id": 511}
    tokens = adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **arguments)
    logits = model(tokens).logits[0]
    assert torch.equal(logits[IDS.shape[1] - 1 : -1].argmax(-1), tokens[0, IDS.shape[1] :])
    with model.reference() as reference:
        assert not torch.equal(reference(tokens).logits[0], logits)


# The reference model


@pytest.mark.parametrize("modules_to_save", [None, ["llm2vae", "vae2llm"]])
def test_reference_is_the_base_model(model, modules_to_save):
    base = outputs(model)
    adapted = get_peft_model(model, lora("both", model, modules_to_save=modules_to_save))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    own = outputs(model)
    assert not torch.equal(own[0], base[0])
    assert not torch.equal(own[1], base[1])
    with model.reference() as reference:
        assert equal(outputs(reference), base)
        with model.reference() as nested:
            assert equal(outputs(nested), base)
        assert equal(outputs(reference), base)
    assert equal(outputs(model), own)


class Boom(Exception):
    pass


@pytest.mark.parametrize("raises", [False, True])
def test_reference_restores_what_is_trained(model, raises):
    """PEFT's own `disable_adapter` would make parameters trainable that were frozen on purpose."""
    adapted = get_peft_model(model, lora("both", model, modules_to_save=["llm2vae"]))
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name and "layers.2" in name:
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    assert set(before.values()) == {True, False}
    own = outputs(model)
    try:
        with model.reference():
            if raises:
                raise Boom
    except Boom:
        assert raises
    assert {name: parameter.requires_grad for name, parameter in adapted.named_parameters()} == before
    assert equal(outputs(model), own)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_reference_is_what_was_kept_of_the_start(model, adapted, raises):
    if adapted:
        get_peft_model(model, lora("both", model))
    before, trained = outputs(model), {name: p.requires_grad for name, p in model.named_parameters()}
    model.keep_reference()
    assert model.kept_reference.keys() == {name for name, on in trained.items() if on}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    own = outputs(model)
    assert not equal(own, before)
    try:
        with model.reference() as reference:
            assert equal(outputs(reference), before)
            with model.reference() as nested:
                assert equal(outputs(nested), before)
            assert equal(outputs(reference), before)
            if raises:
                raise Boom
    except Boom:
        assert raises
    assert equal(outputs(model), own)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert not any("_reference" in name for name in model.state_dict())
    model.release_reference()
    assert model.kept_reference is None


def test_no_reference_is_said_clearly(model):
    with (
        pytest.raises(RuntimeError, match="no adapters, and its start was not kept. Call `keep_reference`"),
        model.reference(),
    ):
        pass


# Images painted, and their velocities


def painted(model, plan: RolloutPlan, count: int = 1):
    trajectories = [trajectory([375, 10 + i, 376]) for i in range(count)]
    return paint(model, trajectories, plan, [torch.Generator().manual_seed(i) for i in range(count)])


def test_rollout_does_not_depend_on_its_batch_size(model):
    trajectories = [trajectory([375, i, 376, 375], [40] * i) for i in range(5)]
    found = []
    for batch_size in (None, 2, 1):
        windows = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3], [0, 1]])
        plan = RolloutPlan(flow_timesteps(5), SIZE, windows=windows, batch_size=batch_size)
        found.append(paint(model, trajectories, plan, [torch.Generator().manual_seed(i) for i in range(5)]))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one.context.ids, other.context.ids)
            assert torch.equal(one.steps.t, other.steps.t)
            torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=1e-5)
            for a, b in zip(columns(one.steps).values(), columns(other.steps).values(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_images_hold_only_their_own_memory(model):
    """An image that is kept for training, or written to disk, is alone, not a view of the batch."""
    for image in painted(model, RolloutPlan(flow_timesteps(4), SIZE, windows=torch.tensor([0, 1])), count=3):
        for value in (image.latents, *columns(image.steps).values()):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_images_say_what_stood_before_them_and_how_large_they_are(model):
    plan = RolloutPlan(flow_timesteps(3), SIZE)
    for row, image in enumerate(painted(model, plan, count=2)):
        assert (image.context.ids.tolist(), image.size) == ([375, 10 + row, 376], SIZE)
        assert (image.guidance, image.branches, len(image.steps)) == (None, {}, 0)


def test_rollout_of_nothing(model):
    assert paint(model, [], RolloutPlan(flow_timesteps(3), SIZE), []) == []


@pytest.mark.parametrize("packs", [False, True])
def test_velocities_carry_no_gradient_when_none_is_asked_for(model, packs):
    model.packs_velocities = packs
    steps = steps_of(painted(model, RolloutPlan(flow_timesteps(5), SIZE, windows=torch.tensor([0, 1]))))
    with torch.no_grad():
        found = [(index.tolist(), v.requires_grad) for index, v in model.velocities(steps, context_grad=True)]
    assert found == ([([0, 1], False)] if packs else [([0], False), ([1], False)])


@pytest.mark.parametrize("packs", [False, True])
def test_backbone_passes_its_velocity_on(model, packs):
    model.packs_velocities = packs
    steps = steps_of(painted(model, RolloutPlan(flow_timesteps(5), SIZE, windows=torch.tensor([0, 1]))))
    output = model.base_model(torch.tensor([[375, 10, 376]]), steps=steps)
    assert isinstance(output, UnifiedOutput)
    assert output.velocity.shape == (2, 6, 64)


def test_images_of_a_batch_have_one_size(model):
    """Both sizes have six tokens: only their places differ."""
    images = []
    for size in ((32, 48), (48, 32)):
        images += painted(model, RolloutPlan(flow_timesteps(3), size, windows=torch.tensor([0])))
    with pytest.raises(ValueError, match=r"got \[\(32, 48\), \(48, 32\)\]: make a batch per size"):
        steps_of(images)


def test_an_image_of_latents_that_are_not_numbers_is_marked_whatever_the_model_makes_of_it():
    model = toy_painter(300)
    latents = torch.zeros(2, *model.latent_shape((8, 8)))
    latents[1, 0, 0] = float("inf")
    images = [Image(latents=x, size=(8, 8), context=None, steps=None) for x in latents]
    assert [has_failed(image) for image in decode(model, images)] == [False, True]
