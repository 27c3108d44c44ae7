"""BAGEL's text and image paths against each other: packed and separate, padded and single, cached and not."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.bagel_checks import END, PAD, SIZE, START, assert_equal, assert_same_gradients
from tests.helpers.painting import steps_at, steps_of, trajectory
from trl_unigrpo.flow import (
    flow_timesteps,
    log_ratio,
    scale_with_latents,
    sde_transition,
)
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.bagel.vision import UNDERSTANDING_MODULES
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.models.memory import fitting
from trl_unigrpo.sampling import paint
from trl_unigrpo.trajectory import Image, Steps, Trajectory


MARKERS = {383, 384}

# Prompts of several lengths, opened for a thinking; thinkings that end, that ran out of length, and none.
PROMPTS = [[START, 10, 11, 12, 13, 14, END, START], [START, 20, END, START], [START, 30, 31, 32, END, START]]
COMPLETIONS = [[40, 41, 42, END], [50, 51, 52, 53, 54, 55, 56, 57, 58], []]
CONTEXTS = [
    [START, 10, 11, 12, 13, 14, END, START, 40, 41, 42, END],
    [START, 20, END, START, 50, 51, 52, 53, 54, 55, 56, 57, 58, END],  # the longest is one that ran out of length
    [START, 30, 31, 32, END],
]


@pytest.fixture
def trajectories() -> list[Trajectory]:
    return [trajectory(*row) for row in zip(PROMPTS, COMPLETIONS, strict=True)]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(3)]


@pytest.fixture
def images(model, trajectories) -> list[Image]:
    plan = RolloutPlan(flow_timesteps(5), SIZE, windows=torch.tensor([0, 1, 3]))
    return paint(model, trajectories, plan, generators())


@pytest.fixture
def steps(images) -> Steps:
    """Nine rows: three steps of each of three images."""
    return steps_of(images)


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and mask, padded with a real token id that must not be seen."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def padded_as_in_trl(prompts=PROMPTS, completions=COMPLETIONS) -> tuple[Tensor, Tensor]:
    """TRL's layout: prompts padded on the left, completions on the right."""
    (prompt, prompt_mask), (completion, completion_mask) = padded(prompts, left=True), padded(completions, left=False)
    return torch.cat([prompt, completion], 1), torch.cat([prompt_mask, completion_mask], 1)


def single_velocities(model, steps, context_grad: bool = True) -> Tensor:
    """Velocity of every step, from its own unpadded forward."""
    contexts = []
    for image in steps.images:
        with torch.set_grad_enabled(torch.is_grad_enabled() and context_grad):
            contexts.append(model.encode_context([image.context]))
    rows = zip(steps.image.tolist(), steps.x.split(1), steps.t.split(1), strict=True)
    return torch.cat([model.predict_velocity(contexts[image], x, t, steps.image_size) for image, x, t in rows])


# Padding and batches


@torch.no_grad()
def test_text_does_not_depend_on_left_padding(model):
    ids, mask = padded(PROMPTS, left=True)
    logits = model(ids, attention_mask=mask).logits
    for row, prompt in zip(logits, PROMPTS, strict=True):
        assert_equal(row[-len(prompt) :], model(torch.tensor([prompt])).logits[0])


@torch.no_grad()
def test_backbone_gives_text_rows_in_the_layout_given(model):
    ids, mask = padded_as_in_trl()
    hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
    assert hidden.shape == (*ids.shape, 64)
    for i in range(3):
        alone = model.base_model(torch.tensor([PROMPTS[i] + COMPLETIONS[i]])).last_hidden_state[0]
        assert_equal(hidden[i][mask[i].bool()], alone)


@torch.no_grad()
def test_contexts_and_velocities_do_not_depend_on_the_batch(model):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, *model.latent_shape(SIZE), generator=generator)
    times = torch.tensor([1.0, 0.7, 0.4, 0.1])
    rows = [ContextRow(torch.tensor(row, dtype=torch.long)) for row in [*CONTEXTS, []]]
    context = model.encode_context(rows)
    velocity = model.predict_velocity(context, latents, times, SIZE)
    for i, row in enumerate(rows):
        alone = model.encode_context([row])
        for batched, single in zip(context.keys + context.values, alone.keys + alone.values, strict=True):
            assert_equal(batched[i, :, : len(row)], single[0])
        assert_equal(velocity[i], model.predict_velocity(alone, latents[i : i + 1], times[i : i + 1], SIZE)[0])


@torch.no_grad()
def test_predicting_leaves_the_context_alone(model):
    context = model.encode_context([ContextRow(torch.tensor(row)) for row in CONTEXTS])
    before = [x.clone() for x in context.keys + context.values]
    latents = torch.ones(3, *model.latent_shape(SIZE))
    first = model.predict_velocity(context, latents, torch.full((3,), 0.5), SIZE)
    assert torch.equal(model.predict_velocity(context, latents, torch.full((3,), 0.5), SIZE), first)
    assert all(torch.equal(a, b) for a, b in zip(before, context.keys + context.values, strict=True))


def test_images_stand_behind_the_true_length_of_their_context(model, steps):
    positions = []
    model.language_model.model.register_forward_hook(lambda module, inputs, outputs: positions.append(inputs[2:4]))
    ids, mask = padded_as_in_trl()
    model.base_model(ids, attention_mask=mask, steps=steps)
    [(und, gen)] = positions
    lengths = torch.tensor([len(row) for row in CONTEXTS])[:, None]
    assert torch.equal(und[:, -6:], lengths.expand(3, 6))
    assert torch.equal(gen, lengths.expand(3, 18))


# The packed call


@pytest.mark.parametrize("context_grad", [False, True])
def test_packed_call_is_a_text_call_and_separate_velocities(model, steps, gradients, context_grad):
    ids, mask = padded_as_in_trl()
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in [(3, 17, 64), (9, 6, 64)]]
    real = mask[..., None].bool()

    output = model.base_model(ids, attention_mask=mask, steps=steps, context_grad=context_grad)
    text = model.base_model(ids, attention_mask=mask).last_hidden_state
    velocity = single_velocities(model, steps, context_grad)
    assert_equal(output.last_hidden_state * real, text * real)
    assert_equal(output.velocity, velocity)

    def loss(hidden: Tensor, velocity: Tensor) -> Tensor:
        return (hidden * real * weights[0]).sum() + (velocity * weights[1]).sum()

    packed = gradients(model, loss(output.last_hidden_state, output.velocity))
    assert_same_gradients(packed, gradients(model, loss(text, velocity)))


@pytest.mark.parametrize("context_grad", [False, True])
def test_three_routes_to_velocities_agree(model, steps, gradients, context_grad):
    """Packed with text, packed without, and one by one, each back-propagated before the next."""
    ids, mask = padded_as_in_trl()
    with_text = model.base_model(ids, attention_mask=mask, steps=steps, context_grad=context_grad).velocity
    expected = gradients(model, with_text.square().sum())
    without_text = model.predict_velocities(steps, context_grad)
    assert_equal(without_text, with_text)
    assert_same_gradients(gradients(model, without_text.square().sum()), expected)
    [(index, at_once)] = model.velocities(steps, context_grad)
    assert index.tolist() == list(range(9))
    assert torch.equal(at_once, without_text)
    model.packs_velocities = False
    model.zero_grad()
    for k, (index, velocity) in enumerate(model.velocities(steps, context_grad)):
        assert index.tolist() == [k, 3 + k, 6 + k]
        assert_equal(velocity, with_text[index])
        velocity.square().sum().backward()
    assert k == 2
    actual = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert_same_gradients(actual, expected)
    with torch.no_grad():
        assert_equal(model.base_model(ids, attention_mask=mask, steps=steps).velocity, with_text)


def test_velocity_reaches_a_caller_that_sees_only_the_head(model, steps):
    into = []
    output = model.base_model(*padded_as_in_trl(), steps=steps, into=into)
    assert len(into) == 1
    assert into[0] is output.velocity


@torch.no_grad()
def test_copies_do_not_see_each_other(model, steps):
    before = model.base_model(*padded_as_in_trl(), steps=steps)
    second = torch.arange(9) % 3 == 1  # of each image
    changed = replace(steps, states=replace(steps.states, x=steps.x + second[:, None, None]))
    after = model.base_model(*padded_as_in_trl(), steps=changed)
    assert_equal(after.velocity[~second], before.velocity[~second], 1e-6)
    assert_equal(after.last_hidden_state, before.last_hidden_state, 1e-6)
    assert (after.velocity[second] - before.velocity[second]).abs().max() > 0.1


@torch.no_grad()
def test_rollout_and_packed_call_agree(model, steps):
    velocity = model.base_model(*padded_as_in_trl(), steps=steps).velocity
    assert_equal(velocity, steps.states.velocity)
    assert_equal(velocity, single_velocities(model, steps))


def test_context_closes_every_thinking(model, trajectories, images):
    assert [row.ids.tolist() for row in model.contexts(trajectories)] == CONTEXTS
    assert [image.context.ids.tolist() for image in images] == CONTEXTS
    plain = trajectory([START, 7, END])  # a prompt that opens no thinking
    assert model.contexts([plain])[0].ids.tolist() == [START, 7, END]


@torch.no_grad()
def test_mask_of_truncated_completions_does_not_change_velocities(model, steps):
    ids, mask = padded_as_in_trl()
    zeroed = mask.clone()
    zeroed[1, len(PROMPTS[0]) :] = 0  # as TRL's mask_truncated_completions does
    before = model.base_model(ids, attention_mask=mask, steps=steps)
    after = model.base_model(ids, attention_mask=zeroed, steps=steps)
    assert_equal(after.velocity, before.velocity, 1e-6)
    assert_equal(after.last_hidden_state[zeroed.bool()], before.last_hidden_state[zeroed.bool()], 1e-6)


def test_backbone_refuses_a_cache(model):
    with pytest.raises(ValueError, match="use_cache=False"):
        model.base_model(torch.tensor(PROMPTS[:1]), use_cache=True)


# Gradients


def test_text_loss_of_a_packed_call_spares_the_image_expert(model, steps, gradients):
    output = model.base_model(*padded_as_in_trl(), steps=steps, context_grad=True)
    result = gradients(model, model.get_output_embeddings()(output.last_hidden_state).square().mean())
    image = {name for name in result if model.is_image_parameter(name)}
    assert len(image) == 4 * 14 + 1 + 8
    silent = image | {name for name in result if name.startswith(UNDERSTANDING_MODULES)}
    for name, gradient in result.items():
        assert (gradient.count_nonzero() == 0) == (name in silent), name


def test_without_context_gradient_only_the_markers_lead_into_the_text_expert(model, steps, gradients):
    output = model.base_model(*padded_as_in_trl(), steps=steps, context_grad=False)
    result = gradients(model, output.velocity.square().sum())
    rows = result["language_model.model.embed_tokens.weight"].abs().sum(1).nonzero().flatten().tolist()
    assert set(rows) == MARKERS
    full = gradients(model, model.predict_velocities(steps, context_grad=True).square().sum())
    rows = full["language_model.model.embed_tokens.weight"].abs().sum(1).nonzero().flatten().tolist()
    assert set(rows) == MARKERS | {token for row in CONTEXTS for token in row}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient_of_the_packed_call(model, steps, gradients, reentrant):
    def loss() -> Tensor:
        output = model.base_model(*padded_as_in_trl(), steps=steps, context_grad=True)
        return output.last_hidden_state.square().sum() + output.velocity.square().sum()

    model.train()
    expected = gradients(model, loss())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(model, loss()), expected, tolerance=1e-6)


@pytest.mark.parametrize("context_grad", [False, True])
def test_gradient_checkpointing_changes_no_gradient_of_single_velocities(model, steps, gradients, context_grad):
    def loss() -> Tensor:
        return sum(velocity.square().sum() for _, velocity in model.velocities(steps, context_grad))

    model.packs_velocities = False

    model.train()
    expected = gradients(model, loss())
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, loss()), expected, tolerance=1e-6)


def test_position_table_is_never_trained(model, checkpoint):
    assert "latent_pos_embed.pos_embed" in model.state_dict()
    assert "latent_pos_embed.pos_embed" not in dict(model.named_parameters())


# Generation


def generate(model, ids: Tensor, mask: Tensor, **kwargs) -> Tensor:
    arguments = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD, "eos_token_id": 511, **kwargs}
    return model.generate(ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]


def test_generation_does_not_depend_on_left_padding(model):
    tokens = generate(model, *padded(PROMPTS, left=True))
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        assert torch.equal(row, generate(model, *padded([prompt], left=True))[0])


def test_equal_prompts_are_prefilled_once(model):
    rows = [PROMPTS[i] for i in (1, 1, 0, 2, 2, 1)]
    ids, mask = padded(rows, left=True)
    expected = generate(model, ids, mask, use_cache=False)
    with torch.no_grad():
        prefilled = model(ids, attention_mask=mask, use_cache=True)
        assert_equal(prefilled.logits[:, -1], model(ids, attention_mask=mask).logits[:, -1])
    assert prefilled.past_key_values.get_seq_length() == ids.shape[1]
    batches = []
    model.language_model.model.register_forward_hook(lambda module, inputs, outputs: batches.append(len(inputs[0])))
    assert torch.equal(generate(model, ids, mask), expected)
    assert batches == [3] + [6] * 7


def test_static_cache_generates_the_same(model):
    ids, mask = padded(PROMPTS, left=True)
    tokens = generate(model, ids, mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(tokens, generate(model, ids, mask, use_cache=False))


def test_samples_of_equal_prompts_differ(model):
    ids, mask = padded([PROMPTS[0]] * 8, left=True)
    torch.manual_seed(0)
    tokens = generate(model, ids, mask, do_sample=True, top_k=0)
    assert len(tokens.unique(dim=0)) == 8


def test_generation_under_gradient_checkpointing(model):
    ids, mask = padded(PROMPTS, left=True)
    expected = generate(model, ids, mask)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(generate(model, ids, mask), expected)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, attention_mask=mask, use_cache=True)


# Precision


@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_bfloat16_stays_within_its_own_noise(model, recorded, how):
    """The official bf16 arithmetic is 1.0e-2 (rms) from float32 on these inputs."""
    ids = torch.cat([recorded["prefill/input_ids"], recorded["think/context_ids"]])
    size = tuple(recorded["flow/image_hw"].tolist())
    steps = steps_at([ContextRow(ids)], recorded["flow/x_t"][None], recorded["flow/t"][None], size)
    if how == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        velocity = model.base_model(ids[None], steps=steps).velocity
        context = model.encode_context([ContextRow(ids)])
        alone = torch.cat(
            [
                model.predict_velocity(context, x, t, size)
                for x, t in zip(recorded["flow/x_t"].split(1), recorded["flow/t"].split(1), strict=True)
            ]
        )
    assert velocity.dtype == alone.dtype == torch.float32
    noise = (recorded["bf16/velocity"] - recorded["flow/velocity"]).square().mean().sqrt()
    for actual in (velocity, alone):
        assert (actual - recorded["flow/velocity"]).square().mean().sqrt() < 1.5 * noise


def test_bfloat16_rollout_records_float32(model, trajectories):
    plan = RolloutPlan(flow_timesteps(4), SIZE, windows=torch.tensor([0, 1]))
    for image in paint(model.to(torch.bfloat16), trajectories, plan, generators()):
        steps = image.steps
        assert all(x.dtype == torch.float32 for x in (steps.x, steps.x_next, steps.velocity, image.latents))
        # Not rounded to bfloat16 after the noise was added.
        assert (steps.x_next != steps.x_next.bfloat16().float()).float().mean() > 0.9


# Images


def test_images_must_fit_the_model(model):
    assert model.latent_shape((64, 96)) == (24, 64)
    for size in [(40, 64), (64, 40), (0, 64), (1040, 64)]:
        with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels.* multiple of 16, at most 1024"):
            model.latent_shape(size)
    with pytest.raises(ValueError, match="multiple of 16"):
        model.encode_images(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ValueError, match="multiple of 16"):
        paint(model, [trajectory([1], [2])], RolloutPlan(flow_timesteps(2), (40, 64)), [torch.Generator()])


def test_decoded_tensor_is_the_image_with_a_gradient(model):
    latents = torch.randn(2, *model.latent_shape(SIZE), generator=torch.Generator().manual_seed(0)).requires_grad_()
    pixels = model.decode_latents(latents, SIZE, "pt")
    assert pixels.shape == (2, 3, *SIZE)
    for image, tensor in zip(model.decode_latents(latents, SIZE), pixels.detach(), strict=True):
        assert image.size == (SIZE[1], SIZE[0])
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        assert (levels - tensor.clamp(-1, 1)).abs().max() <= 1.001 / 255
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    pixels.square().mean().backward()
    with torch.no_grad():
        ends = [model.decode_latents(latents + e * direction, SIZE, "pt").square().mean() for e in (-1e-2, 1e-2)]
    assert (latents.grad * direction).sum().item() == pytest.approx((ends[1] - ends[0]).item() / 2e-2, rel=2e-2)
    with pytest.raises(ValueError, match="expected 'pil' or 'pt'"):
        model.decode_latents(latents, SIZE, "np")


def test_decoding_inverts_the_order_of_patches(model):
    """Encoding looks at one place of the image per token; decoding puts the token there."""
    latents = torch.zeros(2, *model.latent_shape((64, 96)))
    latents[1, 9] = 3.0  # row 1, column 3 of 4 x 6
    difference = model.decode_latents(latents, (64, 96), "pt").diff(dim=0)[0].abs().sum(0)
    cells = difference.unflatten(0, (4, 16)).unflatten(2, (6, 16)).sum((1, 3)).flatten()
    assert cells.argmax() == 9


def test_copies_share_the_vae(model):
    clone = copy.deepcopy(model)
    assert clone.codec is model.codec
    with torch.no_grad():
        clone.llm2vae.weight.zero_()
    assert model.llm2vae.weight.abs().sum() > 0


def test_no_vae_is_said_clearly(model):
    model.codec = None
    with pytest.raises(ValueError, match=r"no VAE: put `ae.safetensors`"):
        model.decode_latents(torch.zeros(1, 6, 64), SIZE)


def test_generators_must_match_samples(model, trajectories):
    with pytest.raises(ValueError, match="1 generators for 3 trajectories"):
        paint(model, trajectories, RolloutPlan(flow_timesteps(2), SIZE), [torch.Generator()])


# Memory


@torch.no_grad()
def test_slices_of_the_vae_change_nothing(model):
    latents = torch.randn(3, *model.latent_shape((32, 48)), generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = model.decode_latents(latents, (32, 48), "pt"), model.encode_images(pixels)
    sizes, decode = [], model.codec.vae.decode
    model.codec.vae.decode = lambda x: (sizes.append(len(x)), decode(x))[1]
    model.codec.slice_size = 2
    assert_equal(model.decode_latents(latents, (32, 48), "pt"), whole[0])
    assert_equal(model.encode_images(pixels), whole[1])
    assert sizes == [2, 1]


@pytest.mark.slow
@torch.no_grad()
def test_tiles_of_the_vae_change_little(model):
    size = (512, 1024)
    # Every tile has the mean and the spread of the whole, on which the VAE's norms depend.
    row = torch.linspace(0, 16 * torch.pi, 64).sin().expand(32, 64).reshape(1, -1, 1)
    latents = row * torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    whole = model.decode_latents(latents, size, "pt")
    model.codec.slice_size = 0  # not even one image fits
    tiled = model.decode_latents(latents, size, "pt")
    assert model.codec.vae.use_tiling
    assert tiled.shape == whole.shape
    difference = (tiled - whole).abs().mean() / whole.std()
    assert 0 < difference < 0.2


def test_what_fits_into_free_memory(model):
    assert fitting(None, 10) is None
    assert fitting(1000, 100) == 8
    assert fitting(100, 101) == 0
    assert model.images_at_once(SIZE) is None  # nothing is counted on a CPU


# Full-size latents


@pytest.mark.parametrize(("pixels", "numbers"), [(512, 65_536), pytest.param(1024, 262_144, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rollout_and_training_agree_within_the_clip_range(model, trajectories, pixels, numbers, dtype):
    """As a RatioNorm log-ratio, whose clip range at this size is that of the paper scaled."""
    model.to(dtype)
    size, nodes, window = (pixels, pixels), flow_timesteps(25), torch.tensor([0, 1, 2])
    plan = RolloutPlan(nodes[:4], size, window)  # all that is recorded
    steps = steps_of(paint(model, trajectories, plan, generators()))
    assert steps.x[0].numel() == numbers
    velocity, states = model.base_model(*padded_as_in_trl(), steps=steps).velocity, steps.states
    step = sde_transition(states.t, states.t_next, 0.8, nodes[1])
    ratio = log_ratio(states.x, states.x_next, velocity, states.velocity, step)
    clip = scale_with_latents(1e-6, numbers)
    if dtype == torch.float32:
        assert ratio.square().mean().sqrt() < 1e-7
        assert ratio.abs().max() < 0.01 * clip
    else:
        assert ratio.square().mean().sqrt() < 0.15 * clip


def test_eager_attention_is_plain_products(model, steps):
    """Text and velocities are the same but for rounding, and no fused kernel computes them."""

    def kernels(name):
        model.set_attn_implementation(name)
        with torch.profiler.profile() as profile, torch.no_grad():
            outputs = model(input_ids=torch.tensor(PROMPTS[0])[None]).logits, *dict(model.velocities(steps)).values()
        model.set_attn_implementation("sdpa")
        return {e.key for e in profile.key_averages() if "_scaled_dot_product" in e.key}, outputs

    (fused, expected), (plain, found) = kernels("sdpa"), kernels("eager")
    assert plain == {"aten::_scaled_dot_product_attention_math"} and not plain & fused
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
