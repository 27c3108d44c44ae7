"""The image sampler against closed forms and a hand-written loop."""

import itertools

import pytest
import torch
from torch import Tensor

from trl_unigrpo.flow import cps_transition, flow_timesteps, sde_transition
from trl_unigrpo.flow.sampler import RolloutPlan, draw_noise, sample_latents
from trl_unigrpo.flow.states import SDESteps, columns


SHAPE = (3, 4)
NODES = flow_timesteps(6, shift=3.0)


def linear(latents: Tensor, timesteps: Tensor) -> Tensor:
    """v = 0.5 x + t: an Euler step is x (1 + dt / 2) + t dt."""
    return 0.5 * latents + timesteps[:, None, None]


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def sample(count: int = 4, velocity=linear, seeds: int = 0, **plan) -> list[tuple[Tensor, SDESteps]]:
    """Each image and its stochastic steps."""
    plan, own = RolloutPlan(**{"timesteps": NODES, "image_size": (48, 64), **plan}), generators(count, seeds)
    latents, steps = sample_latents(velocity, draw_noise(SHAPE, own, range(count), "cpu"), plan, own)
    return list(zip(latents, steps, strict=True))


def tensors(image: Tensor, steps: SDESteps) -> list[Tensor]:
    return [image, *columns(steps).values()]


def test_without_a_window_it_is_eulers_method():
    for row, (image, steps) in enumerate(sample()):
        x = torch.randn(SHAPE, generator=generators(1, row)[0]).double()
        for t, t_next in itertools.pairwise(NODES):
            x = x * (1 + (t_next - t) / 2) + t * (t_next - t)
        torch.testing.assert_close(image, x.float(), rtol=0, atol=1e-5)
        assert steps.x.shape == steps.x_next.shape == steps.velocity.shape == (0, *SHAPE)
        assert steps.t.shape == steps.t_next.shape == (0,)
        assert len(steps) == 0


def test_straight_flow_ends_at_its_target_in_any_number_of_steps():
    target = torch.linspace(-1, 1, 12).view(SHAPE)

    def straight(latents: Tensor, timesteps: Tensor) -> Tensor:
        return (latents - target) / timesteps[:, None, None]

    for number in (1, 2, 7):
        for image, _ in sample(velocity=straight, timesteps=flow_timesteps(number)):
            torch.testing.assert_close(image, target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_steps_are_the_hand_written_loop(sde_type):
    window, noise_level = [0, 2, 3], 0.7
    [(image, steps)] = sample(1, windows=torch.tensor(window), sde_type=sde_type, noise_level=noise_level, seeds=5)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SHAPE, generator=generator).double()
    for i, (t, t_next) in enumerate(itertools.pairwise(NODES)):
        velocity = 0.5 * x + t
        if i not in window:
            x = x + (t_next - t) * velocity
            continue
        k = window.index(i)
        if sde_type == "sde":
            a, b, std = sde_transition(t, t_next, noise_level, t_first=NODES[1])
        else:
            a, b, std = cps_transition(t, t_next, noise_level)
        x_next = a * x + b * velocity + std * torch.randn(SHAPE, generator=generator).double()
        for actual, expected in (
            (steps.x[k], x),
            (steps.velocity[k], velocity),
            (steps.x_next[k], x_next),
            (steps.t[k], t),
            (steps.t_next[k], t_next),
        ):
            torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-5)
        x = x_next
    torch.testing.assert_close(image, x.float(), rtol=0, atol=1e-5)


def test_recorded_noise_is_standard_normal():
    """eps = (x_next - a x - b v) / std of many samples has mean 0, variance 1 and no memory of the state."""
    tables = [steps for _, steps in sample(400, windows=torch.tensor([0, 1]))]
    for k in (0, 1):
        a, b, std = sde_transition(NODES[k], NODES[k + 1], 0.8, t_first=NODES[1])
        x, x_next, velocity = (
            torch.stack([getattr(steps, name)[k] for steps in tables]).double() for name in ("x", "x_next", "velocity")
        )
        eps = (x_next - a * x - b * velocity) / std
        assert eps.mean().abs() < 0.05
        assert eps.var().item() == pytest.approx(1, abs=0.06)
        assert (eps * x).mean().abs() < 0.06


def test_states_are_float32_whatever_the_model_computes_in():
    def half(latents: Tensor, timesteps: Tensor) -> Tensor:
        assert latents.dtype == timesteps.dtype == torch.float32
        return linear(latents, timesteps).bfloat16()

    for image, steps in sample(velocity=half, windows=torch.tensor([0, 1])):
        found = tensors(image, steps)
        assert len(found) == 6
        assert {tensor.dtype for tensor in found} == {torch.float32}
        assert (steps.x_next != steps.x_next.bfloat16().float()).float().mean() > 0.9


def test_one_window_for_all_and_one_per_row():
    together = sample(3, windows=torch.tensor([1, 3]))
    assert all(torch.equal(steps.t, NODES[[1, 3]].float()) for _, steps in together)
    rows = torch.tensor([[1, 3], [0, 2], [2, 3]])
    apart = sample(3, windows=rows)
    for (_, steps), row in zip(apart, rows, strict=True):
        assert torch.equal(steps.t, NODES[row].float())
        assert torch.equal(steps.t_next, NODES[row + 1].float())
    # A sample does not notice the other samples' windows.
    for one, other in zip(tensors(*apart[0]), tensors(*together[0]), strict=True):
        assert torch.equal(one, other)


def test_samples_do_not_depend_on_their_batch():
    rows = torch.tensor([[1, 3], [0, 2], [2, 3], [0, 1]])
    together = sample(4, windows=rows)
    for i in range(4):
        [alone] = sample(1, windows=rows[i : i + 1], seeds=i)
        for one, other in zip(tensors(*together[i]), tensors(*alone), strict=True):
            assert torch.equal(one, other)


def test_same_seed_same_image_and_other_seed_other_noise():
    plan = {"windows": torch.tensor([0, 1])}
    first, again, other = sample(2, **plan), sample(2, **plan), sample(2, seeds=9, **plan)
    # All but the times; noise differs within a group, too.
    found = [[x for x in tensors(*one) if x.ndim > 1] for one in (first[0], again[0], other[0], first[1])]
    assert len(found[0]) == 4
    for one, same, seed, neighbour in zip(*found, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, seed)
        assert not torch.equal(one, neighbour)


def test_steps_hold_only_their_own_memory():
    """A sample that is kept for training, or written to disk, is alone, not a view of the batch."""
    for _, steps in sample(4, windows=torch.tensor([0, 1])):
        for value in columns(steps).values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_rows_of_a_plan():
    plan = RolloutPlan(NODES, (48, 64), windows=torch.tensor([[0], [1], [2]]))
    assert plan.rows(slice(1, 3)).windows.tolist() == [[1], [2]]
    shared = RolloutPlan(NODES, (48, 64), windows=torch.tensor([0, 1]))
    assert shared.rows(slice(1, 3)) is shared


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.tensor([4, 6]), r"window \[4, 6\] reaches beyond the 6 denoising steps.*Narrow `sde_window_range`"),
        (torch.tensor([-1]), r"window \[-1\] reaches beyond"),
        (torch.tensor([[0], [1]]), r"Got 2 windows for 4 images: pass one \(K,\) for all, or one row each"),
        (torch.tensor([5]), r"An SDE step may not end at t = 0"),
    ],
)
def test_windows_that_do_not_fit(windows, message):
    with pytest.raises(ValueError, match=message):
        sample(windows=windows)


def test_sampling_asks_for_no_gradient():
    weight = torch.ones((), requires_grad=True)
    [(image, steps)] = sample(1, velocity=lambda x, t: weight * linear(x, t), windows=torch.tensor([0]))
    assert not steps.velocity.requires_grad
    assert not image.requires_grad
