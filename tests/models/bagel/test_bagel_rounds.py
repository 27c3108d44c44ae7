"""Several rounds a trajectory: one packed forward over all passages is each round's own forward."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.bagel_checks import END, PAD, SIZE, START, assert_equal, assert_same_gradients
from tests.helpers.painting import image_at
from trl_unigrpo.flow.states import States
from trl_unigrpo.models.bagel import modeling
from trl_unigrpo.models.bagel.segments import ContextImage
from trl_unigrpo.trajectory import Round, Steps, Trajectory, from_state, to_state


PLACEHOLDER, SYSTEM = 386, [START, 5, 6, END]


def finished(seed: int) -> ContextImage:
    generator = torch.Generator().manual_seed(seed)
    return ContextImage(torch.randn(6, 64, generator=generator), (2, 3), torch.randn(4, 64, generator=generator))


def trajectory(
    model, row: int, rounds: int, fresh: bool, stops: bool = False, source: int | None = None
) -> Trajectory:
    """
    One of so many rounds, whose images have 1, 2, .. trained steps; the last may paint none. It may be of an edit,
    whose prompt shows a source image.
    """
    generator, shown = torch.Generator().manual_seed(row), [] if source is None else [finished(source)]
    prompt_ids = [*SYSTEM, *[PLACEHOLDER] * len(shown), START, 10 + row, END, START]
    made = Trajectory("", prompt_ids, row, system_ids=SYSTEM, images=shown)
    for number in range(rounds):
        cut = number == 0 and row % 2 == 1  # a text that ran out of length, which what follows closes
        text = [20 + number, 30 + row, *[40] * (row % 3), *([] if cut else [END])]
        part = Round(text)
        if number:
            closing = [END] if made.rounds[-1].text_ids[-1] != END and not fresh else []
            part.observation_ids = [*closing, PLACEHOLDER, START, 50 + number, END, START]
            part.shown, part.fresh = [finished(10 * row + number)], fresh
        part.stopped = stops and number == rounds - 1
        made.rounds.append(part)
        if not part.stopped:
            count = 1 + (row + number) % 3
            x, t = torch.randn(count, 6, 64, generator=generator), 0.05 + 0.9 * torch.rand(count, generator=generator)
            (before,) = model.contexts([made.now()])
            part.images.append(image_at(before, x, t, SIZE))
    return made


BATCHES = {
    "one": [(1, False), (1, False)],
    "two": [(2, False), (2, False)],
    "three": [(3, False), (3, False)],
    "ragged": [(2, True), (1, False), (3, False), (2, False), (3, True)],
    "edits": [(2, False, 100), (1, False, 101), (3, False, 102), (2, True, 103), (2, False)],
}


@pytest.fixture(params=["markov", "full"])
def fresh(request) -> bool:
    return request.param == "markov"


@pytest.fixture(params=BATCHES)
def batch(request, model, fresh) -> list[Trajectory]:
    return [trajectory(model, row, one[0], fresh, *one[1:]) for row, one in enumerate(BATCHES[request.param])]


def text_rows(trajectories) -> tuple[Tensor, Tensor]:
    """TRL's rows: prompts padded on the left, what follows on the right."""
    before, after = max(len(t.prompt_ids) for t in trajectories), max(len(t.row_ids) for t in trajectories)
    ids, mask = torch.full((len(trajectories), before + after), PAD), torch.zeros(len(trajectories), before + after)
    for i, t in enumerate(trajectories):
        place = slice(before - len(t.prompt_ids), before + len(t.row_ids))
        ids[i, place], mask[i, place] = torch.tensor([*t.prompt_ids, *t.row_ids]), 1
    return ids, mask.long()


def sampled(trajectories) -> Tensor:
    """(B, T) whether the state there is the one that a token of a text is sampled from."""
    before, after = max(len(t.prompt_ids) for t in trajectories), max(len(t.row_ids) for t in trajectories)
    found = torch.zeros(len(trajectories), before + after, dtype=torch.bool)
    for i, t in enumerate(trajectories):
        at = before
        for part in t.rounds:
            at += len(part.observation_ids)
            found[i, at - 1 : at + len(part.text_ids) - 1] = True
            at += len(part.text_ids)
    return found


def apart(model, trajectories, context_grad) -> tuple[Tensor, Tensor]:
    """States that all texts are sampled from, and all velocities: each round as a forward of its own."""
    states, velocities = [], []
    for t in trajectories:
        for number, part in enumerate(t.rounds):
            seen = replace(t, rounds=t.rounds[: number + 1]).now()
            ids = torch.tensor([[*seen.prompt_ids, *seen.rounds[-1].text_ids]])
            hidden = model.base_model(ids, images=[seen.images]).last_hidden_state[0]
            states.append(hidden[-len(part.text_ids) - 1 : -1])
            for image in part.images:
                with torch.set_grad_enabled(torch.is_grad_enabled() and context_grad):
                    encoded = model.encode_context(model.contexts([seen]))
                for x, time in zip(image.steps.x.split(1), image.steps.t.split(1), strict=True):
                    velocities.append(model.predict_velocity(encoded, x, time, SIZE))
    return torch.cat(states), torch.cat(velocities)


@pytest.mark.parametrize("context_grad", [False, True])
def test_packed_is_apart(model, batch, gradients, context_grad):
    passages = [t.passages() for t in batch]
    output = model.base_model(*text_rows(batch), steps=Steps.of(batch), context_grad=context_grad, passages=passages)
    actual = output.last_hidden_state[sampled(batch)], output.velocity
    expected = apart(model, batch, context_grad)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator) for x in expected]
    for found, wanted in zip(actual, expected, strict=True):
        assert_equal(found, wanted)

    def loss(parts) -> Tensor:
        return sum((x * w).sum() for x, w in zip(parts, weights, strict=True))

    assert_same_gradients(gradients(model, loss(actual)), gradients(model, loss(expected)))


@torch.no_grad()
def test_texts_alone_are_those_of_the_packed_forward(model, batch):
    rows, passages = text_rows(batch), [t.passages() for t in batch]
    packed = model.base_model(*rows, steps=Steps.of(batch), passages=passages).last_hidden_state
    alone = model.base_model(*rows, passages=passages).last_hidden_state
    assert_equal(alone[sampled(batch)], packed[sampled(batch)])
    if all(len(t.rounds) == 1 for t in batch):
        assert_equal(alone[rows[1].bool()], model.base_model(*rows).last_hidden_state[rows[1].bool()])


@torch.no_grad()
@pytest.mark.parametrize("fresh", [True, False])
def test_what_a_round_sees(model, fresh):
    """A change of the first text reaches the second round where it sees it; the future reaches nobody."""

    def velocities(**changed):
        t = trajectory(model, 0, 2, fresh)
        for name, value in changed.items():
            number, field = int(name[-1]), name[:-2]
            setattr(t.rounds[number], field, value)
        for number, part in enumerate(t.rounds):
            seen = replace(t, rounds=t.rounds[: number + 1]).now()
            part.images = [replace(part.images[0], context=model.contexts([seen])[0])]
        return model.base_model(*text_rows([t]), steps=Steps.of([t]), passages=[t.passages()]).velocity.split([1, 2])

    plain = velocities()
    first = velocities(text_ids_0=[21, 30, END])
    assert (first[0] - plain[0]).abs().max() > 0.01
    assert torch.allclose(first[1], plain[1], atol=1e-6) == fresh
    shown = velocities(shown_1=[finished(77)])
    assert torch.allclose(shown[0], plain[0], atol=1e-6)
    assert (shown[1] - plain[1]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("fresh", [True, False])
def test_source_of_another_row_reaches_the_rounds_that_see_it(model, fresh):
    batch = [trajectory(model, row, 2, fresh, source=100 + row) for row in (0, 1)]

    def velocities():
        for t in batch:
            for number, part in enumerate(t.rounds):
                seen = replace(t, rounds=t.rounds[: number + 1]).now()
                part.images = [replace(part.images[0], context=model.contexts([seen])[0])]
        passages = [t.passages() for t in batch]
        return model.base_model(*text_rows(batch), steps=Steps.of(batch), passages=passages).velocity

    plain, steps = velocities(), Steps.of(batch)
    batch[0].images, batch[1].images = batch[1].images, batch[0].images
    moved = (velocities() - plain).flatten(1).abs().amax(1)
    assert (moved[steps.round == 0] > 0.01).all()
    assert ((moved[steps.round == 1] > 1e-3) == (not fresh)).all()


@pytest.mark.parametrize("fresh", [True, False])
def test_rounds_of_a_trajectory_share_as_few_rows_as_can_be(model, fresh, monkeypatch):
    made, lay_out = [], modeling.lay_out
    monkeypatch.setattr(modeling, "lay_out", lambda *args: made.append(lay_out(*args)) or made[-1])
    batch = [trajectory(model, row, 2, fresh) for row in range(3)]
    model.base_model(*text_rows(batch), steps=Steps.of(batch), passages=[t.passages() for t in batch])
    assert len(made[0].contexts) == (6 if fresh else 3)


@torch.no_grad()
def test_row_whose_text_is_blanked_has_its_velocities(model):
    """As TRL blanks rows that `mask_truncated_completions` leaves out."""
    batch = [trajectory(model, row, 1, False, source=row) for row in (0, 1)]
    (ids, mask), passages = text_rows(batch), [t.passages() for t in batch]
    plain = model.base_model(ids, mask, steps=Steps.of(batch), passages=passages)
    real, blanked = sampled(batch), mask.clone()
    blanked[0, max(len(t.prompt_ids) for t in batch) :] = 0
    found = model.base_model(ids, blanked, steps=Steps.of(batch), passages=passages)
    assert_equal(found.velocity, plain.velocity)
    assert_equal(found.last_hidden_state[1][real[1]], plain.last_hidden_state[1][real[1]])


def test_passages_of_another_trajectory_are_refused(model):
    batch = [trajectory(model, row, 2, True) for row in (0, 6)]
    assert len(batch[0].row_ids) == len(batch[1].row_ids)
    with pytest.raises(ValueError, match="passages"):
        model.base_model(*text_rows(batch), passages=[t.passages() for t in reversed(batch)])


def test_images_are_shown_as_they_look(model):
    """Either the latents that were painted, or those of the decoded image: by the posterior's mean, both times."""
    latents = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    images = [image_at(None, x[None], torch.ones(1), SIZE) for x in latents]
    images = [replace(image, latents=x) for image, x in zip(images, latents, strict=True)]
    seen = model.decode_latents(latents, SIZE)
    direct, again = (model.observe(images, seen, reencode) for reencode in (False, True))
    for i in range(2):
        assert torch.equal(direct[i].latents, latents[i])
        assert direct[i].grid == again[i].grid == (2, 3)
        assert again[i].latents.shape == latents[i].shape
        assert not torch.allclose(again[i].latents, latents[i], atol=0.1)
        assert torch.equal(direct[i].features, again[i].features)
    assert torch.equal(model.observe(images, seen, True)[1].latents, again[1].latents)


def test_rounds_survive_a_checkpoint(model, tmp_path):
    made = trajectory(model, 0, 3, True, stops=True)
    made.rounds[0].reward = 0.5
    types = (*model.context_types, States)
    torch.save(to_state([made], types), tmp_path / "rounds.pt")
    (back,) = from_state(torch.load(tmp_path / "rounds.pt", weights_only=True), types)
    assert back.row_ids == made.row_ids
    assert [(r.fresh, r.stopped, r.reward) for r in back.rounds] == [
        (r.fresh, r.stopped, r.reward) for r in made.rounds
    ]
    assert torch.equal(back.rounds[1].shown[0].features, made.rounds[1].shown[0].features)
    # One object still, by which copies find the row that shows it.
    assert back.rounds[1].images[0].context.images[0] is back.rounds[1].shown[0]
