"""Trajectories of any number of images as a table of their trained steps, and what a checkpoint keeps of them."""

from dataclasses import dataclass, field

import pytest
import torch

from trl_unigrpo.flow.guidance import Guidance
from trl_unigrpo.flow.states import LinePoints, SDESteps, columns
from trl_unigrpo.models.bagel.segments import ContextImage
from trl_unigrpo.models.contract import ContextRow, UnifiedModelMixin
from trl_unigrpo.trainers.checkpoint import load_rollouts, save_rollouts
from trl_unigrpo.trainers.kept import KeptVelocities
from trl_unigrpo.trajectory import Image, Round, Steps, Trajectory, from_state, in_order, to_state


LATENT = (3, 2)


def noisy(count, first=0.0):
    """Steps whose every number is their own."""
    x = first + torch.arange(count * 6, dtype=torch.float32).view(count, *LATENT)
    t = torch.linspace(0.9, 0.5, count) if count else torch.zeros(0)
    return SDESteps(x=x, t=t, x_next=x + 0.25, t_next=t - 0.1, velocity=-x)


def lines(count, first=0.0):
    steps = noisy(count, first)
    return LinePoints(x=steps.x, t=steps.t, target=steps.x_next)


def image(count, name=0, states=noisy, **more):
    latents = torch.full(LATENT, float(name))
    return Image(latents, (8, 8), f"context {name}", states(count, 100.0 * name), seed=(name,), **more)


def three_trajectories(states=noisy):
    """Two rounds of three images; none that is alive; two images, of which one has no trained step."""
    return [
        Trajectory(
            "a", [1], 0, [Round([5], [image(3, 0, states), image(1, 1, states)]), Round([6], [image(2, 2, states)])]
        ),
        Trajectory("b", [2], 1, [Round([7])]),
        Trajectory("c", [3], 2, [Round([8]), Round([], [image(0, 3, states), image(2, 4, states)])]),
    ]


# The table


@pytest.mark.parametrize("states", [noisy, lines])
def test_table_of_several_rounds_and_ragged_windows(states):
    trajectories = three_trajectories(states)
    steps = Steps.of(trajectories)
    images = [image for trajectory in trajectories for _, image in trajectory.painted()]
    assert len(steps) == steps.total == 8
    assert steps.images == tuple(images)
    assert steps.image.tolist() == [0, 0, 0, 1, 2, 2, 4, 4]
    assert steps.row.tolist() == [0, 0, 0, 0, 0, 0, 2, 2]
    assert steps.round.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert steps.contexts == [f"context {i}" for i in steps.image.tolist()]
    assert steps.image_size == (8, 8)
    for name, column in columns(steps.states).items():
        assert torch.equal(column, torch.cat([getattr(image.steps, name) for image in images]))
    assert steps.x is steps.states.x
    assert steps.t is steps.states.t


@pytest.mark.parametrize("states", [noisy, lines])
def test_image_that_is_no_number_weighs_nothing(states):
    sound, broken = three_trajectories(states), three_trajectories(states)
    bad = broken[0].rounds[0].images[1]
    bad.latents = torch.full_like(bad.latents, torch.nan)
    bad.steps = type(bad.steps)(**{n: x * torch.nan if x.ndim > 1 else x for n, x in columns(bad.steps).items()})
    before, after = Steps.of(sound), Steps.of(broken)
    assert all(x.isfinite().all() for x in columns(after.states).values())
    assert torch.equal(after.weight, before.weight.where(before.image != 1, 0.0))
    assert torch.equal(after.states.x[after.image != 1], before.states.x[before.image != 1])


def test_mean_goes_over_steps_of_an_image_then_images_then_trajectories():
    steps = Steps.of(three_trajectories())
    values = torch.tensor([0.3, -1.7, 2.2, 5.0, 0.01, -0.4, 11.0, -3.0], dtype=torch.float64)
    first = ((0.3 - 1.7 + 2.2) / 3 + 5.0 + (0.01 - 0.4) / 2) / 3
    last = (11.0 - 3.0) / 2  # the image without a trained step is none of this trajectory's
    assert steps.mean(values).item() == pytest.approx((first + 0 + last) / 3, rel=1e-6)
    assert steps.mean(torch.ones(8)).item() == pytest.approx(2 / 3)


def test_shares_of_parts_add_up_to_the_mean():
    steps, values = Steps.of(three_trajectories()), torch.randn(8, generator=torch.Generator().manual_seed(0))
    shares = sum(steps[index].mean(values[index]) for index in (torch.tensor([7, 0]), slice(1, 4), [4, 5, 6]))
    torch.testing.assert_close(shares, steps.mean(values))


def test_plain_mean_where_each_trajectory_has_one_image_of_one_window():
    steps = Steps.of([Trajectory("p", [1], row, [Round([2], [image(3, row)])]) for row in range(4)])
    assert torch.equal(steps.weight, torch.ones(12))
    values = torch.randn(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(steps.mean(values), values.sum() / 12)


def test_trajectories_that_count_for_nothing_weigh_nothing():
    values = torch.tensor([0.3, -1.7, 2.2, 5.0, 0.01, -0.4, 11.0, -3.0], dtype=torch.float64)
    steps = Steps.of(three_trajectories(), torch.tensor([False, True, True]))
    assert steps.mean(values).item() == pytest.approx((11.0 - 3.0) / 2 / 3, rel=1e-6)  # still a mean over three
    everything = Steps.of(three_trajectories(), torch.tensor([True, True, True]))
    assert torch.equal(everything.weight, Steps.of(three_trajectories()).weight)


@pytest.mark.parametrize("states", [noisy, lines])
def test_dead_images_are_left_out_and_count_in_the_mean(states):
    """As if they were there with values of 0, whatever the round."""
    whole, left = three_trajectories(states), three_trajectories(states)
    dead = [0, 4]
    for number, image in enumerate(image for t in left for _, image in t.painted()):
        image.share = 0.0 if number in dead else 1.5
    table, part = Steps.of(whole), Steps.of(left)
    alive = ~torch.isin(table.image, torch.tensor(dead))
    assert torch.equal(part.x, table.x[alive]) and torch.equal(part.row, table.row[alive])
    values = torch.arange(1.0, 9.0)
    torch.testing.assert_close(part.mean(values[alive]), table.mean(values * alive))
    torch.testing.assert_close(part[torch.tensor([0])].mean_of_live(torch.ones(1)), part.weight[0] * 1.5 / part.total)
    torch.testing.assert_close(part.mean_of_live(values[alive]), 1.5 * table.mean(values * alive))


def test_table_of_dead_images_alone_keeps_one_that_weighs_nothing():
    trajectories = three_trajectories()
    for t in trajectories:
        for _, image in t.painted():
            image.share = 0.0
    steps = Steps.of(trajectories)
    assert len(steps) == len(trajectories[0].rounds[0].images[0].steps) and steps.mean(torch.ones(3)) == 0


def test_part_of_a_table_keeps_its_numbers():
    steps = Steps.of(three_trajectories())
    part = steps[torch.tensor([6, 1, 3])]
    assert len(part) == 3
    assert part.total == 8
    assert part.image.tolist() == [4, 0, 1]
    assert part.row.tolist() == [2, 0, 0]
    assert part.round.tolist() == [1, 0, 0]
    assert torch.equal(part.weight, steps.weight[[6, 1, 3]])
    assert part.images is steps.images
    assert part.contexts == ["context 4", "context 0", "context 1"]
    for name, column in columns(part.states).items():
        assert torch.equal(column, getattr(steps.states, name)[[6, 1, 3]])
    assert torch.equal(part[1:].x, steps.x[[1, 3]])


def test_places_hold_one_step_of_an_image_each_and_every_step_once():
    steps = Steps.of(three_trajectories())
    assert [index.tolist() for index in steps.by_place()] == [[0, 3, 4, 6], [1, 5, 7], [2]]
    shuffled = steps[torch.tensor([7, 2, 3, 6, 0])]  # images 4, 0, 1, 4, 0
    assert [index.tolist() for index in shuffled.by_place()] == [[0, 1, 2], [3, 4]]
    assert steps[:0].by_place() == []


def test_parts_are_joined_in_the_order_of_the_table():
    steps = Steps.of(three_trajectories())
    joined = in_order((index, steps.x[index]) for index in reversed(steps.by_place()))
    assert torch.equal(joined, steps.x)


def test_numbers_and_times_stay_on_the_cpu():
    steps = Steps.of(three_trajectories()).to(torch.device("meta"))
    on_device = {
        "x": steps.x,
        "x_next": steps.states.x_next,
        "velocity": steps.states.velocity,
        "weight": steps.weight,
    }
    on_cpu = {
        "t": steps.t,
        "t_next": steps.states.t_next,
        "image": steps.image,
        "row": steps.row,
        "round": steps.round,
    }
    assert {name for name, x in on_device.items() if x.device.type != "meta"} == set()
    assert {name for name, x in on_cpu.items() if x.device.type != "cpu"} == set()
    part = steps[torch.tensor([1, 2], device="cpu")]
    assert part.x.device.type == "meta"
    assert part.t.tolist() == steps.t[1:3].tolist()


def test_branch_puts_the_same_steps_behind_other_contexts():
    images = [image(2, 0, branches={"text": "t0", "image": "i0"}), image(1, 1, branches={"text": "t1", "image": "i1"})]
    steps = Steps.of([Trajectory("p", [1], 0, [Round([2], images)])])
    branch = steps.branch("image")
    assert branch.contexts == ["i0", "i0", "i1"]
    assert steps.contexts == ["context 0", "context 0", "context 1"]
    assert branch.x is steps.x


def test_guidance_is_that_of_all_images():
    def table(*guidances):
        images = [image(1, number, guidance=guidance) for number, guidance in enumerate(guidances)]
        return Steps.of([Trajectory("p", [1], 0, [Round([2], images)])])

    assert table(Guidance(3.0), Guidance(3.0)).guidance == Guidance(3.0)
    assert table(None, None).guidance == Guidance()
    for mixed in [(Guidance(3.0), Guidance(2.0)), (None, Guidance(3.0))]:
        with pytest.raises(ValueError, match="sampled with different guidance: make a batch for each"):
            _ = table(*mixed).guidance


def test_what_is_no_table():
    with pytest.raises(ValueError, match="have no images: there is nothing to train the image expert on"):
        Steps.of([Trajectory("p", [1], 0, [Round([2])]), Trajectory("q", [1])])
    with pytest.raises(ValueError, match="have no trained step: there is nothing to train the image expert on"):
        Steps.of([Trajectory("p", [1], 0, [Round([2], [image(0, 1), image(0, 2)])])])
    wide = image(1, 1)
    wide.size = (8, 16)
    with pytest.raises(ValueError, match=r"must have one size, got \[\(8, 8\), \(8, 16\)\]: make a batch per size"):
        Steps.of([Trajectory("p", [1], 0, [Round([2], [image(1), wide])])])
    with pytest.raises(ValueError, match=r"states of different kinds: \['LinePoints', 'SDESteps'\]"):
        Steps.of([Trajectory("p", [1], 0, [Round([2], [image(1), image(1, 1, lines)])])])


def test_trajectory_lists_its_texts_and_images():
    first = three_trajectories()[0]
    assert first.text_ids == [5, 6]
    assert [(number, image.context) for number, image in first.painted()] == [
        (0, "context 0"),
        (0, "context 1"),
        (1, "context 2"),
    ]


# Velocities kept beside it


def test_kept_velocities_find_their_images_in_any_order():
    trajectories, kept = three_trajectories(), KeptVelocities()
    steps = Steps.of(trajectories)
    assert kept.at("old", steps) is None
    kept.keep("old", steps, 10 * steps.x)
    kept.keep("reference", steps, 20 * steps.x)
    other = Steps.of(trajectories[::-1])
    assert not torch.equal(other.x, steps.x)
    assert torch.equal(kept.at("old", other), 10 * other.x)
    restored = KeptVelocities()
    restored.restore(from_state(to_state(kept.state())))
    assert torch.equal(restored.at("reference", Steps.of(trajectories[2:])), 20 * steps.x[6:])
    kept.clear()
    assert kept.at("old", steps) is None


@pytest.mark.parametrize("states", [noisy, lines])
def test_image_goes_to_a_device_with_its_states_and_without_its_times(states):
    here = image(2, states=states)
    there = here.to("meta")
    assert there.latents.device.type == "meta"
    assert all(x.device.type == ("meta" if x.ndim > 1 else "cpu") for x in columns(there.steps).values())
    assert (there.context, there.seed, there.size) == (here.context, here.seed, here.size)
    assert here.latents.device.type == here.steps.x.device.type == "cpu"


def test_two_images_of_one_name_are_refused():
    kept = KeptVelocities()
    twice = Steps.of([Trajectory("p", [1], 0, [Round([2], [image(2, 1), image(2, 1)])])])
    with pytest.raises(ValueError, match=r"Two images of a generation batch have the seed \(1,\)"):
        kept.keep("old", twice, twice.x)


# What a checkpoint keeps


@dataclass
class Stanza:
    """A third party's context."""

    words: torch.Tensor | None = None
    notes: dict = field(default_factory=dict)
    before: tuple = ()


@dataclass
class Named(Stanza):
    """One that is named after a type of the package."""


Named.__name__ = "Image"


def assert_same(left, right):
    """The same types, the same bits."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif hasattr(left, "__dataclass_fields__"):
        assert_same(vars(left), vars(right))
    else:
        assert left == right


def kept(folder, value, types=()):
    """The value, through a file that is read as data only."""
    torch.save(to_state(value, types), folder / "state.pt")
    return from_state(torch.load(folder / "state.pt", weights_only=True), types)


def bagel_context(seen):
    return ContextRow(torch.tensor([4, 5, 9, 6]), [seen])


def test_trajectories_whose_contexts_hold_images_come_back_bit_for_bit(tmp_path):
    trajectories = three_trajectories()
    seen = ContextImage(torch.randn(4, 2), (2, 2), torch.randn(3, 5, dtype=torch.bfloat16))
    trajectories[0].images = [seen]
    trajectories[0].prompt = [{"role": "user", "content": "a"}]
    trajectories[2].system_ids = [1, 2]
    for trajectory in trajectories:
        for _, painted in trajectory.painted():
            painted.context = bagel_context(seen)
            painted.guidance = Guidance(3.0, interval=(0.2, 0.9))
            painted.branches = {"text": ContextRow(torch.tensor([9]), [seen])}
    back = kept(tmp_path, trajectories, (ContextRow, ContextImage))
    assert_same(back, trajectories)
    steps = Steps.of(back)
    assert torch.equal(steps.x, Steps.of(trajectories).x)
    # What was one thing is one thing: a packed forward looks for images that contexts have in common.
    shown = [context.images[0] for context in steps.contexts]
    assert all(one is shown[0] for one in shown)
    assert back[0].images[0] is shown[0]


@pytest.mark.parametrize(
    "value", [float("nan"), -0.0, 1e-45, True, None, 2**70, "", [], (), {}, [(), [[]], {"a": ()}]]
)
def test_plain_values_come_back(tmp_path, value):
    assert repr(kept(tmp_path, value)) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_in_their_type(tmp_path, dtype):
    for shape in [(2, 3), (0, 4), ()]:
        value = torch.ones(shape).to(dtype)
        assert_same(kept(tmp_path, value), value)


def test_context_of_a_third_party(tmp_path):
    stanza = Stanza(torch.randn(3), {"tone": "high", 3: torch.tensor([1])}, (Stanza(), torch.ones(2)))
    assert_same(kept(tmp_path, [stanza], (Stanza,)), [stanza])


def test_rows_of_tokens_are_kept_for_a_model_that_names_nothing(tmp_path):
    row = ContextRow(torch.tensor([4, 5]))
    assert_same(kept(tmp_path, [row], UnifiedModelMixin.context_types), [row])


def test_dataclass_that_is_not_named_is_refused_when_it_is_saved_and_when_it_is_read(tmp_path):
    with pytest.raises(TypeError, match=r"can't keep a Stanza: .* dataclasses that its `context_types` names"):
        to_state({"context": Stanza()})
    with pytest.raises(TypeError, match=r"can't keep a Stanza"):
        save_rollouts(tmp_path, 0, {"buffer": [Stanza()]}, (ContextRow,))
    save_rollouts(tmp_path, 0, {"buffer": [Stanza()]}, (Stanza,))
    with pytest.raises(ValueError, match=r"holds a Stanza, which this model does not know. Name the dataclass"):
        load_rollouts(tmp_path, 0, (ContextRow,))


def test_dataclass_with_the_name_of_another_is_refused():
    with pytest.raises(TypeError, match="can't keep a Image"):
        to_state(Named())


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", Stanza, lambda: 0, torch.float32, 1j])
def test_what_is_no_data_is_refused(value):
    with pytest.raises(TypeError, match=rf"can't keep a {type(value).__name__}: what a model's `contexts` returns"):
        to_state([value], (Stanza,))


def test_gradient_and_parameters_are_kept_as_numbers():
    weight = torch.nn.Parameter(torch.ones(2))
    state = to_state([weight, 2 * weight])
    assert [type(x) for x in state] == [torch.Tensor, torch.Tensor]
    assert [x.requires_grad for x in state] == [False, False]


@pytest.mark.parametrize("view", [lambda x: x[7], lambda x: x[:, 3], lambda x: x[0, 0].expand(3, 1000)])
def test_view_is_kept_without_what_it_looks_at(tmp_path, view):
    whole = torch.randn(100, 1000)
    back = kept(tmp_path, [view(whole)])
    assert (tmp_path / "state.pt").stat().st_size < 20_000
    assert_same(back, [view(whole)])


def test_what_two_hold_is_kept_once(tmp_path):
    big = torch.randn(100, 1000)
    back = kept(tmp_path, [Stanza(big), Stanza(big), big, big[:50], big[:50]], (Stanza,))
    assert (tmp_path / "state.pt").stat().st_size < 1_000_000
    assert back[0].words is back[1].words


def test_rollouts_of_a_file_that_is_not_there(tmp_path):
    assert load_rollouts(tmp_path, 0) is None
