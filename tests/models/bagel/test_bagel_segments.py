"""Contexts with images: the table of segments, and every way to compute with it against every other."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.bagel_checks import END, PAD, SIZE, START, assert_equal, assert_same_gradients
from tests.helpers.painting import image_at, steps_at, steps_of, trajectory
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.bagel import BagelProcessor
from trl_unigrpo.models.bagel.attention import ROWWISE_QUERIES, Layout, attend_streams
from trl_unigrpo.models.bagel.segments import ContextImage, segments
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.sampling import paint
from trl_unigrpo.trajectory import Round, Steps, Trajectory


IMAGE = 386  # the placeholder
MARKERS = (383, 384)


def image(seed: int, grid: tuple[int, int] | None = (2, 3), patches: int | None = 4) -> ContextImage:
    generator = torch.Generator().manual_seed(seed)
    latents = None if grid is None else torch.randn(grid[0] * grid[1], 64, generator=generator)
    features = None if patches is None else torch.randn(patches, 64, generator=generator)
    return ContextImage(latents, grid or (0, 0), features)


def row(ids: list[int], *images: ContextImage) -> ContextRow:
    return ContextRow(torch.tensor(ids), images)


# Ragged rows: two readers, one each, several images, none; images at other places in each row.
ROWS = [
    row([START, 10, END, IMAGE, START, 11, 12, END], image(0)),
    row([IMAGE, START, 20, END], image(1, (1, 2), None)),
    row([START, 30, 31, 32, END, IMAGE, 33, IMAGE], image(2, None, 3), image(3, (3, 3), 2)),
    row([START, 40, END]),
]
# Rows that differ behind their image only, as those of one prompt do.
ALIKE = [
    row([START, 10, END, IMAGE, START, 11, END], image(0)),
    row([START, 20, END, IMAGE, START, 21, 22, 23, END], image(1)),
]


def table(rows: list[ContextRow]):
    return segments(rows, IMAGE, MARKERS)


# The table


def test_table_of_one_row_by_hand():
    t = table([row([7, IMAGE, 8], image(0, (1, 2), 1))])
    first, last = MARKERS
    assert t.ids.tolist() == [[7, first, last, first, 0, last, 8]]
    assert t.positions.tolist() == [[0, 1, 1, 2, 2, 2, 3]]
    assert t.image_positions.tolist() == [[1, 1]]
    # text 7 | marker, two latents, marker | marker, patch, marker | text 8
    assert t.order.tolist() == [[0, 1, 7, 8, 2, 3, 4, 5, 6]]
    assert t.sees.tolist() == [[0, 4, 4, 4, 4, 7, 7, 7, 8]]
    assert t.blocks == [(1, 5), (5, 8)]
    assert t.prefix_lengths == [[0, 1, 8, 9]]
    assert t.prefix_positions == [[0, 1, 3, 4]]
    assert t.text_index.tolist() == [[0, 1, 6]]
    assert t.lengths == [9]


def test_rows_with_images_elsewhere_have_no_blocks_in_common():
    assert table(ROWS).blocks is None
    assert table(ALIKE).blocks == [(3, 11), (11, 17)]
    assert table([row([7, 8]), row([9])]).sees is None


@pytest.mark.parametrize("bad", [row([7, IMAGE]), row([7], image(0)), row([IMAGE, IMAGE], image(0))])
def test_every_placeholder_has_its_image(bad):
    with pytest.raises(ValueError, match="image placeholders .* images: give one image per placeholder"):
        table([ROWS[0], bad])


def test_image_without_content_and_with_a_wrong_grid():
    with pytest.raises(ValueError, match="needs latents, features, or both"):
        ContextImage()
    with pytest.raises(ValueError, match="6 latents do not fill a grid of 2 x 2"):
        ContextImage(torch.zeros(6, 64), (2, 2))


# Attention


@pytest.mark.parametrize("rows", [ROWS, ALIKE], ids=["mask", "blocks"])
def test_attention_is_dense_attention_under_the_table(rows):
    t = table(rows)
    batch, text, latents = *t.ids.shape, t.image_positions.shape[1]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, text + latents, 16, generator=generator) for heads in (4, 2, 2))
    und, gen = (tuple(x[:, :, part] for x in (q, k, v)) for part in (slice(text), slice(text, None)))
    out_und, out_gen, keys, _ = attend_streams(und, gen, Layout(text, segments=t), 0, None)
    for i, length in enumerate(t.lengths):
        order = t.order[i, :length]
        mask = torch.arange(length) <= t.sees[i, :length, None]
        one_q, one_k, one_v = (x[i, :, order] for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        expected = (one_q @ one_k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ one_v
        actual = torch.cat([out_und, out_gen], 2)[i][:, order]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        assert torch.equal(keys[i, :, :length], k[i, :, order])


# The model


def beginning(whole: ContextRow, length: int) -> ContextRow:
    """The first ids of a context, with the images that are among them."""
    ids = whole.ids[:length]
    return ContextRow(ids, whole.images[: int((ids == IMAGE).sum())])


def copies() -> tuple[Tensor, Tensor]:
    """States (4, 3, 6, 64) and times (4, 3)."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 3, 6, 64, generator=generator), torch.tensor([[1.0, 0.6, 0.2]]).expand(4, -1)


@pytest.fixture
def steps() -> Steps:
    """Three steps behind each of the contexts."""
    return steps_at(ROWS, *copies(), SIZE)


def behind(visible: list[list[int]]) -> Steps:
    """As `steps`, but each step is an image of its own behind so many ids of its row's context."""
    trajectories = []
    for i, (context, seen, x, t) in enumerate(zip(ROWS, visible, *copies(), strict=True)):
        parts = zip(seen, x.split(1), t.split(1), strict=True)
        images = [image_at(beginning(context, length), one, time, SIZE) for length, one, time in parts]
        trajectories.append(Trajectory("", [], i, [Round([], images)]))
    return Steps.of(trajectories)


def alone(model, steps: Steps, step: int) -> Tensor:
    """Velocity of one copy from a forward of its own, over exactly the context that it sees."""
    context = model.encode_context([steps.contexts[step]])
    return model.predict_velocity(context, steps.x[step][None], steps.t[step][None], steps.image_size)[0]


@pytest.mark.parametrize("visible", [None, [[8, 3, 4], [0, 1, 4], [8, 6, 5], [3, 3, 0]]], ids=["all", "prefixes"])
def test_packed_copies_are_separate_ones(model, steps, gradients, visible):
    steps = steps if visible is None else behind(visible)
    packed = model.predict_velocities(steps, context_grad=True)
    separate = torch.stack([alone(model, steps, step) for step in range(12)])
    assert_equal(packed, separate)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    actual, expected = (gradients(model, (v * weights).sum()) for v in (packed, separate))
    assert_same_gradients(actual, expected)
    assert actual["vae2llm.weight"].abs().max() > 0


def test_wide_copies_attend_row_by_row(model, steps, monkeypatch):
    masked = model.predict_velocities(steps)
    monkeypatch.setattr("trl_unigrpo.models.bagel.attention.ROWWISE_QUERIES", 8)
    assert ROWWISE_QUERIES > 8
    assert_equal(model.predict_velocities(steps), masked)


@torch.no_grad()
def test_text_rows_come_back_in_the_layout_given(model, steps):
    # Prompts on the right of their padding, the rest of the context behind it.
    width = 12
    ids, mask = torch.full((4, width), PAD), torch.zeros(4, width, dtype=torch.long)
    starts = [1, 4, 0, 2]
    for i, (start, context) in enumerate(zip(starts, ROWS, strict=True)):
        ids[i, start : start + len(context)], mask[i, start : start + len(context)] = context.ids, 1
    output = model.base_model(ids, attention_mask=mask, steps=steps)
    assert_equal(output.velocity, model.predict_velocities(steps))
    plain = model.base_model(ids, attention_mask=mask, images=[context.images for context in ROWS])
    assert_equal(plain.last_hidden_state[mask.bool()], output.last_hidden_state[mask.bool()])
    for i, (start, context) in enumerate(zip(starts, ROWS, strict=True)):
        single = model.base_model(context.ids[None], images=[context.images]).last_hidden_state[0]
        text = context.ids != IMAGE
        assert_equal(output.last_hidden_state[i, start : start + len(context)][text], single[text])


@torch.no_grad()
def test_contexts_do_not_depend_on_the_batch(model):
    batch = model.encode_context(ROWS)
    for i, context in enumerate(ROWS):
        single = model.encode_context([context])
        assert (batch.lengths[i], batch.positions[i]) == (single.lengths[0], single.positions[0])
        for a, b in zip(batch.keys + batch.values, single.keys + single.values, strict=True):
            assert_equal(a[i, :, : single.lengths[0]], b[0])


def test_checkpointing_changes_no_gradient(model, steps, gradients):
    expected = gradients(model, model.predict_velocities(steps, context_grad=True).square().sum())
    model.train().gradient_checkpointing_enable()
    actual = gradients(model, model.predict_velocities(steps, context_grad=True).square().sum())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@torch.no_grad()
def test_generation_goes_on_from_the_images(model):
    prompts = [ContextRow(torch.cat([r.ids, torch.tensor([START])]), r.images) for r in ROWS]
    width = max(map(len, prompts))
    ids, mask = torch.full((4, width), PAD), torch.zeros(4, width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, -len(prompt) :], mask[i, -len(prompt) :] = prompt.ids, 1
    images = [prompt.images for prompt in prompts]
    arguments = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 511, "pad_token_id": PAD}
    tokens = model.generate(ids, attention_mask=mask, images=images, **arguments)
    assert torch.equal(tokens[:, :width], ids)
    head = model.get_output_embeddings()
    for i, prompt in enumerate(prompts):
        whole = torch.cat([prompt.ids, tokens[i, width:]])
        hidden = model.base_model(whole[None], images=[prompt.images]).last_hidden_state[0]
        assert torch.equal(head(hidden)[len(prompt) - 1 : -1].argmax(-1), tokens[i, width:])


def test_rollout_paints_from_images(model):
    texts, prompt_ids = [[50, END], [51]], [IMAGE, START, 20, END, START]
    trajectories = [trajectory(prompt_ids, text, images=[image(i)]) for i, text in enumerate(texts)]
    plan = RolloutPlan(torch.tensor([1.0, 0.5, 0.0]), SIZE, windows=torch.tensor([0]))
    images = paint(model, trajectories, plan, [torch.Generator().manual_seed(3) for _ in range(2)])
    assert [painted.context.ids.tolist()[-2:] for painted in images] == [[50, END], [51, END]]
    sampled = steps_of(images).states.velocity
    assert_equal(model.predict_velocities(steps_of(images)), sampled)
    # The image counts: with the other one the velocity is another.
    others = [replace(painted, context=ContextRow(painted.context.ids, [image(7)])) for painted in images]
    changed = model.predict_velocities(steps_of(others)) - sampled
    assert changed.abs().amax((1, 2)).min() > 0.01


def test_image_that_does_not_fit_the_position_table(model):
    with pytest.raises(ValueError, match="65 x 1 tokens does not fit the position table, which has 64"):
        model.encode_context([row([IMAGE], image(0, (65, 1), None))])


def test_context_longer_than_the_model_has_positions(model):
    model.config.llm_config.max_position_embeddings = 5
    model.encode_context([row([7] * 4)])
    with pytest.raises(ValueError, match="takes 5 positions, and its image one more, but the model has 5. Shorten"):
        model.encode_context([row([7] * 4), row([7] * 5)])


@torch.no_grad()
def test_image_to_answer_and_to_edit(model, checkpoint):
    """The way of docs/images.md, from a PIL image on."""
    processor = BagelProcessor.from_pretrained(checkpoint)
    some_image = Image.new("RGB", (300, 200), "red")
    shown = model.context_image(processor.vae_pixels(some_image), processor.vit_pixels(some_image))
    assert (shown.grid, len(shown.latents), len(shown.features)) == ((32, 48), 32 * 48, 37 * 55)
    ids = [model.config.image_token_id, *processor.prompt_ids("What is in the image?"), START]
    answer = model.generate(torch.tensor([ids]), images=[[shown]], max_new_tokens=3, do_sample=False, eos_token_id=511)
    assert answer[0, : len(ids)].tolist() == ids
    edit = Trajectory("", prompt_ids=ids, images=[shown])
    (painted,) = paint(model, [edit], RolloutPlan(flow_timesteps(2), SIZE), [torch.Generator().manual_seed(0)])
    context = model.encode_context([ContextRow(torch.tensor(ids[:-1]), [shown])])
    noise = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    halfway = noise - 0.25 * model.predict_velocity(context, noise, torch.ones(1), SIZE)
    end = halfway - 0.75 * model.predict_velocity(context, halfway, torch.tensor([0.75]), SIZE)
    assert_equal(painted.latents, end[0])
