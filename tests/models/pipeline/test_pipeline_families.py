"""Every family of pipelines: what the stock pipeline paints is painted, and what was sampled is computed again."""

import inspect
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModularPipeline
from peft import LoraConfig, get_peft_model

from tests.helpers.painting import prompts_alone, steps_of
from tests.helpers.tiny_painters import PROMPTS, generators, unified
from tests.helpers.tiny_pipelines import FAMILIES
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.pipeline.painter import single_frames
from trl_unigrpo.sampling import decode, paint


STEPS = 4
REGROUPED = 5e-6  # sums of another order
# LoRA weights that no gradient reaches, as the network makes no use of what they compute.
UNUSED = {
    # The last block's text stream ends there.
    "sd3": {r"transformer_blocks.1.attn.add_q_proj"},
    "qwen_image": {
        f"transformer_blocks.1.{name}"
        for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    },
}
# Their encoders see the padding: images of different prompts are painted one after the other.
APART = {"cogview4"}


# The others are the same code on other pipelines: each is tried by `make test-slow`.
QUICK = ("sd3", "flux1", "qwen_image", "lumina2", "modular_z_image")


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def tiny(request):
    if request.param in ("prx", "prx_pixel"):
        pytest.importorskip("ftfy")
    made = FAMILIES[request.param]()
    made.name = request.param
    return made


def adapted(model):
    """With adapters that change what the painter computes."""
    torch.manual_seed(1)
    targets = model.default_lora_targets("image")
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    get_peft_model(model, config)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def counted_rows(network):
    """The rows of each forward of a network; latents are its first argument."""
    rows, original, called = [], type(network).forward, inspect.signature(type(network).forward)

    def counted(*args, **kwargs):
        arguments = called.bind(*args, **kwargs).arguments.values()
        rows.append(len(next(x for x in arguments if isinstance(x, (torch.Tensor, list)))))
        return original(*args, **kwargs)

    type(network).forward = counted
    try:
        yield rows
    finally:
        type(network).forward = original


def stock_images(tiny, arguments):
    """Paint by the pipeline itself, with diffusers' Euler scheduler."""
    pipeline, scheduler = tiny.pipeline, tiny.pipeline.scheduler
    config = {"shift": scheduler.config.get("flow_shift", 1.0), **scheduler.config}
    known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**{k: v for k, v in config.items() if k in known})
    size = {"height": tiny.size[0], "width": tiny.size[1], "num_inference_steps": STEPS}
    for name in ("guider", "ocr_guider"):
        if hasattr(pipeline, name):
            getattr(pipeline, name).disable()
    images = []
    for rows in [[row] for row in range(len(PROMPTS))] if tiny.name in APART else [range(len(PROMPTS))]:
        noise = [generators()[row] for row in rows]
        call = {
            "output_type": "pil",
            **arguments,
            **size,
            "prompt": [PROMPTS[row] for row in rows],
            "generator": noise,
        }
        if isinstance(pipeline, ModularPipeline):
            images += pipeline(**call, output="images")
        else:
            accepted = inspect.signature(type(pipeline).__call__).parameters
            call["max_area"] = tiny.size[0] * tiny.size[1]
            images += single_frames(pipeline(**{k: v for k, v in call.items() if k in accepted})[0])
    pipeline.scheduler = scheduler
    return images


def test_ode_paints_what_the_stock_pipeline_paints(tiny):
    """And the pipeline is left as it was."""
    parts = [tiny.pipeline, *tiny.pipeline.components.values()]
    before = [dict(vars(part)) for part in parts if hasattr(part, "__dict__")]
    model = unified(tiny)
    plan = RolloutPlan(model.own_timesteps(STEPS, tiny.size), tiny.size)
    images = decode(model, paint(model, prompts_alone(PROMPTS), plan, generators()))
    after = [dict(vars(part)) for part in parts if hasattr(part, "__dict__")]
    for old, new in zip(before, after, strict=True):
        for name in ("scheduler", "encode_prompt", "forward", "_enabled", "_progress_bar_config", "transformer"):
            assert new.get(name) is old.get(name)
    expected = stock_images(tiny, model.painter_arguments)
    assert len(images) == len(PROMPTS)
    for image, other in zip(images, expected, strict=True):
        assert image.size == tiny.size[::-1]
        assert np.array_equal(np.asarray(image), np.asarray(other))
    assert len({np.asarray(image).tobytes() for image in images}) == len(PROMPTS)


def test_what_was_sampled_is_computed_again(tiny):
    """With an SDE window of each image's own; with another image's time beside it; and regrouped."""
    model = unified(tiny)
    adapted(model)
    times = model.own_timesteps(STEPS, tiny.size)
    exact = 1e-7 if tiny.name == "sana" else 0.0
    one = paint(model, prompts_alone(PROMPTS), RolloutPlan(times, tiny.size, torch.tensor([0, 1, 2])), generators())
    windows = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 2]])
    own = paint(model, prompts_alone(PROMPTS), RolloutPlan(times, tiny.size, windows), generators())
    for images, limit in ((one, exact), (own, REGROUPED), (one[1::2], REGROUPED), (one[:1], REGROUPED)):
        sampled = torch.stack([image.steps.velocity for image in images], dim=1)
        again = [velocity for _, velocity in model.velocities(steps_of(images))]
        assert all(velocity.requires_grad for velocity in again)
        assert (torch.stack(again) - sampled).abs().max() <= limit
        assert sampled.abs().mean() > 1e-3


def test_an_image_does_not_depend_on_its_neighbours(tiny):
    """Although all are painted together: a step is one forward of as many rows as there are images."""
    model = unified(tiny)
    plan = RolloutPlan(model.own_timesteps(3, tiny.size), tiny.size, torch.tensor([0, 1]))
    with counted_rows(model.painter) as rows:
        together = paint(model, prompts_alone(PROMPTS), plan, generators())
    assert rows == ([1] * len(PROMPTS) * 3 if tiny.name in APART else [len(PROMPTS)] * 3)
    alone = paint(model, prompts_alone(PROMPTS[2:3]), plan, generators(1, first=2))
    torch.testing.assert_close(together[2].steps.x, alone[0].steps.x, rtol=0, atol=1e-5)
    torch.testing.assert_close(together[2].latents, alone[0].latents, rtol=0, atol=1e-5)
    other = paint(model, prompts_alone(PROMPTS[:1]), plan, generators(1, first=2))
    assert (other[0].steps.velocity - alone[0].steps.velocity).abs().max() > 1e-5  # but on its prompt


def test_gradients_reach_every_adapter_and_recomputing_changes_none(tiny):
    """But it keeps less between the forward and the backward pass."""
    model = unified(tiny)
    weights = adapted(model)
    plan = RolloutPlan(model.own_timesteps(STEPS, tiny.size), tiny.size, torch.tensor([1, 2]))
    steps = steps_of(paint(model, prompts_alone(PROMPTS), plan, generators()))
    own = {p.data_ptr() for p in model.parameters()}
    gradients, kept = [], []
    for recompute in (False, True):
        model.zero_grad()
        sizes = []
        if recompute:
            model.gradient_checkpointing_enable()

        def keep(x, sizes=sizes):
            sizes.append(0 if x.data_ptr() in own else x.nbytes)
            return x

        replay = model.velocities(steps)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _, velocity = next(replay)
        kept.append(sum(sizes))
        velocity.square().mean().backward()
        for _, velocity in replay:
            velocity.square().mean().backward()
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in weights.items()})
    assert kept[1] < 0.6 * kept[0]
    none = {name.split(".lora_")[0] for name, gradient in gradients[0].items() if not gradient.any()}
    assert none == {f"painter.{name}" for name in UNUSED.get(tiny.name, ())}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_images_are_encoded_to_what_decodes_to_them(tiny):
    """Against the VAE by itself."""
    model = unified(tiny)
    if getattr(tiny.pipeline, "vae", None) is None:
        with pytest.raises(ValueError, match="no `vae`"):
            model.encode_images(torch.zeros(1, 3, *tiny.size))
        return
    pixels = torch.rand(2, 3, *tiny.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_images(pixels)
    assert latents.shape == (2, *model.latent_shape(tiny.size))
    vae = tiny.pipeline.vae
    with torch.no_grad():
        video = "temperal_downsample" in vae.config
        encoded = vae.encode(pixels[:, :, None] if video else pixels)
        mode = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        expected = vae.decode(mode, return_dict=False)[0]
    expected = (expected[:, :, 0] if video else expected).clamp(-1, 1)
    torch.testing.assert_close(model.decode_latents(latents, tiny.size, "pt"), expected, rtol=0, atol=2e-5)


def test_half_precision_is_replayed_to_the_bit(tiny):
    """Weights in bfloat16, states in float32: what was sampled is computed again, and states are not rounded."""
    model = unified(tiny)
    model.to(torch.bfloat16)
    weights = adapted(model)
    for parameter in weights.values():
        parameter.data = parameter.data.float()
    plan = RolloutPlan(model.own_timesteps(STEPS, tiny.size), tiny.size, torch.tensor([0, 1]))
    images = paint(model, prompts_alone(PROMPTS), plan, generators())
    sampled = torch.stack([image.steps.velocity for image in images], dim=1)
    again = torch.stack([velocity for _, velocity in model.velocities(steps_of(images))])
    assert again.requires_grad
    assert torch.equal(again, sampled)
    for image in images:
        assert image.steps.x_next.dtype == torch.float32
        assert not torch.equal(image.steps.x_next, image.steps.x_next.bfloat16().float())
    assert len(decode(model, images)) == len(images)
