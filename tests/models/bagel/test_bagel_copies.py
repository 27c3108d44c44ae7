"""Any number of images a row, and of steps an image: one packed forward is as many forwards of one copy each."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.bagel_checks import END, PAD, SIZE, START, assert_equal, assert_same_gradients
from tests.helpers.painting import image_at
from trl_unigrpo.flow.guidance import Guidance
from trl_unigrpo.models.bagel.copies import begins, lay_out
from trl_unigrpo.models.bagel.segments import ContextImage
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.trajectory import Image, Round, Steps, Trajectory, in_order


PLACEHOLDER = 386


def finished(seed: int) -> ContextImage:
    generator = torch.Generator().manual_seed(seed)
    return ContextImage(torch.randn(6, 64, generator=generator), (2, 3), torch.randn(4, 64, generator=generator))


SHOWN, OTHER = finished(1), finished(2)
TEXTS = [
    [START, 10, 11, END],
    [START, 20, END, START, 21, 22, END, START, 23, END],
    [START, 30, END, PLACEHOLDER, START, 31, 32, END, START, 33, END],
    [START, 40, PLACEHOLDER, 41, END],
    [START, 50, 51, END],  # nothing is painted after it
]


def context(ids: list[int], *images: ContextImage) -> ContextRow:
    return ContextRow(torch.tensor(ids, dtype=torch.long), images)


# For each text row its images: what stands before each, and its number of steps.
PAINTED = [
    [(context(TEXTS[0]), 3)],
    # The beginning first, as it was painted first; an image whose steps are all deterministic.
    [(context(TEXTS[1][:3]), 2), (context(TEXTS[1][:7]), 0), (context(TEXTS[1]), 1)],
    # Before and behind the finished image, and what no text row says: a thinking that ran out of length, closed.
    [
        (context(TEXTS[2][:3]), 1),
        (context(TEXTS[2], SHOWN), 2),
        (context([*TEXTS[2][:7], 99, END], SHOWN), 3),
        (context([*TEXTS[2][:7], 99], SHOWN), 1),
    ],
    # The same words behind another image.
    [(context(TEXTS[3], SHOWN), 1), (context(TEXTS[3], OTHER), 2)],
    [],
]
SHOWN_IN = [[], [], [SHOWN], [SHOWN], []]
NUMBER = 16


@pytest.fixture
def steps() -> Steps:
    generator = torch.Generator().manual_seed(0)

    def image(before: ContextRow, count: int) -> Image:
        x = torch.randn(count, 6, 64, generator=generator)
        return image_at(before, x, 0.05 + 0.9 * torch.rand(count, generator=generator), SIZE)

    rounds = [[Round([], [image(*one)]) for one in row] for row in PAINTED]
    table = Steps.of([Trajectory("", [], number, row) for number, row in enumerate(rounds)])
    assert len(table) == NUMBER
    return table


def rows() -> tuple[Tensor, Tensor]:
    """The text rows (5, T) and their mask, real tokens side by side between a padding that must not be seen."""
    width = 14
    ids, mask = torch.full((5, width), PAD), torch.zeros(5, width, dtype=torch.long)
    for i, (start, text) in enumerate(zip([3, 0, 2, 5, 1], TEXTS, strict=True)):
        ids[i, start : start + len(text)], mask[i, start : start + len(text)] = torch.tensor(text), 1
    return ids, mask


def one_by_one(model, steps: Steps, context_grad: bool) -> Tensor:
    velocities = []
    for before, x, t in zip(steps.contexts, steps.x.split(1), steps.t.split(1), strict=True):
        with torch.set_grad_enabled(torch.is_grad_enabled() and context_grad):
            encoded = model.encode_context([before])
        velocities.append(model.predict_velocity(encoded, x, t, SIZE))
    return torch.cat(velocities)


def text_states(hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The hidden states of all words, row after row."""
    return hidden[mask.bool() & (ids != PLACEHOLDER)]


def single_texts(model) -> Tensor:
    rows = []
    for text, shown in zip(TEXTS, SHOWN_IN, strict=True):
        ids = torch.tensor([text])
        hidden = model.base_model(ids, images=[shown]).last_hidden_state
        rows.append(text_states(hidden, ids, torch.ones_like(ids)))
    return torch.cat(rows)


@pytest.mark.parametrize("context_grad", [False, True])
def test_packed_forward_is_one_by_one(model, steps, gradients, context_grad):
    output = model.base_model(*rows(), steps=steps, context_grad=context_grad)
    text, expected_text = text_states(output.last_hidden_state, *rows()), single_texts(model)
    expected = one_by_one(model, steps, context_grad)
    assert_equal(output.velocity, expected)
    assert_equal(text, expected_text)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator) for x in (text, expected)]

    def loss(text: Tensor, velocity: Tensor) -> Tensor:
        return (text * weights[0]).sum() + (velocity * weights[1]).sum()

    actual = gradients(model, loss(text, output.velocity))
    assert_same_gradients(actual, gradients(model, loss(expected_text, expected)))


@pytest.mark.parametrize("context_grad", [False, True])
def test_velocities_alone_are_one_by_one(model, steps, gradients, context_grad):
    packed, expected = model.predict_velocities(steps, context_grad), one_by_one(model, steps, context_grad)
    assert_equal(packed, expected)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(4))
    actual = gradients(model, (packed * weights).sum())
    assert_same_gradients(actual, gradients(model, (expected * weights).sum()))


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_a_model_that_does_not_pack_gives_the_same_table(model, steps, guided):
    if guided:
        guidance = Guidance(3.0, interval=(0.3, 1.0))
        assert len({guidance.covers(t) for t in steps.t}) == 2
        without = [context([START, 60 + i, END][: i % 4]) for i in range(len(steps.images))]
        images = [
            replace(one, guidance=guidance, branches={"text": c}) for one, c in zip(steps.images, without, strict=True)
        ]
        steps = replace(steps, images=images)
    packed = in_order(model.velocities(steps))
    model.packs_velocities = False
    parts = list(model.velocities(steps))
    assert [len(index) for index, _ in parts] == [9, 5, 2]  # first steps, second ones, third ones
    assert_equal(in_order(parts), packed)


@torch.no_grad()
def test_any_part_of_the_table_in_any_order(model, steps):
    whole = model.predict_velocities(steps)
    for index in (torch.tensor([15, 3, 9, 0, 10]), torch.tensor([7]), steps.image == 6):
        assert_equal(model.predict_velocities(steps[index]), whole[index])


@torch.no_grad()
def test_text_that_goes_on_otherwise_than_a_context(model):
    """A thinking that ran out of length is closed for its image; the next round's text goes on without that."""
    text, seen = [START, 20, END, START, 21, 22, 23, 24, END], [START, 20, END, START, 21, 22, END]
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    one = image_at(context(seen), x, torch.tensor([0.5]), SIZE)
    steps = Steps.of([Trajectory("", [], rounds=[Round([], [one])])])
    output = model.base_model(torch.tensor([text]), steps=steps)
    assert_equal(output.last_hidden_state, model.base_model(torch.tensor([text])).last_hidden_state)
    assert_equal(output.velocity, one_by_one(model, steps, context_grad=False))


def test_contexts_that_begin_another_share_its_row(steps):
    copies = lay_out(steps, [torch.tensor(text) for text in TEXTS])
    own = [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[3], []]
    others = [[*TEXTS[2][:7], 99, END], TEXTS[3]]
    assert [row.ids.tolist() for row in copies.contexts] == own + others
    assert [list(row.images) for row in copies.contexts] == [*SHOWN_IN[:4], [], [SHOWN], [OTHER]]
    latents = copies.latents(copies.place)
    # The longest first; copies that fill a row up see nothing.
    assert copies.visible == [
        [4, 4, 4, 0],
        [10, 3, 3, 0],
        [11, 11, 3, 0],
        [5, 0, 0, 0],
        [0, 0, 0, 0],
        [9, 9, 9, 8],
        [5, 5, 0, 0],
    ]
    for step, place in enumerate(copies.place.T.tolist()):
        assert torch.equal(latents[tuple(place)], steps.x[step])
        assert copies.timesteps[tuple(place)] == steps.t[step]
        seen = copies.contexts[place[0]].ids[: copies.visible[place[0]][place[1]]]
        assert torch.equal(seen, steps.contexts[step].ids)


def test_what_begins_another_context():
    whole = context(TEXTS[2], SHOWN)
    assert begins(whole, whole)
    assert begins(whole, context([]))
    assert begins(whole, context(TEXTS[2][:3]))
    assert begins(whole, context(TEXTS[2][:6], SHOWN))
    assert not begins(whole, context(TEXTS[2][:6], OTHER))
    assert not begins(whole, context([*TEXTS[2], 7], SHOWN))
    assert not begins(whole, context([START, 31]))
