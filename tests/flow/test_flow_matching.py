"""The objectives on lines against closed forms, finite differences and losses written out number by number."""

import math

import pytest
import torch

from trl_unigrpo.flow import (
    line_state,
    line_times,
    matching_log_ratio,
    nft_loss,
    shift_timesteps,
)


def random(*shape, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_there_is_one_time_in_each_part_of_the_schedule():
    edges = shift_timesteps(torch.linspace(0, 1, 9), 3.0)
    times = torch.stack([line_times(8, 3.0, torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert ((times >= edges[:-1]) & (times <= edges[1:])).all()
    # Uniform before the shift: t = 3 u / (1 + 2 u), so u = t / (3 - 2 t).
    assert (times / (3 - 2 * times)).mean().item() == pytest.approx(0.5, abs=0.005)
    assert torch.equal(times[0], line_times(8, 3.0, torch.Generator().manual_seed(0)))


def test_line_goes_from_the_image_to_the_noise_at_its_own_velocity():
    image, noise, _ = random(2, 3, 4)
    t = torch.tensor([0.0, 0.25], dtype=torch.float64)
    x, ahead = line_state(image, noise, t), line_state(image, noise, t + 0.5)
    torch.testing.assert_close(x[0], image[0])
    torch.testing.assert_close((ahead - x) / 0.5, noise - image)
    torch.testing.assert_close(line_state(image, noise, torch.ones(2)), noise)


def test_matching_log_ratio_is_the_fall_of_the_loss():
    velocity, old, target = random(3, 2, 5)
    expected = ((old - target) ** 2).mean(-1) - ((velocity - target) ** 2).mean(-1)
    torch.testing.assert_close(matching_log_ratio(velocity, old, target, 2, centred=False), expected)
    centred = matching_log_ratio(velocity, old, target, 2)
    torch.testing.assert_close(centred, expected + ((velocity - old) ** 2).mean(-1))
    for how in (True, False):
        assert (matching_log_ratio(target, old, target, 2, how) > 0).all()
        assert (matching_log_ratio(old, old, target, 2, how) == 0).all()


@pytest.mark.parametrize(("lines", "epsilon"), [(8, 3e-5), (1, 1e-4)])
def test_centred_clip_takes_both_sides_alike_at_real_sizes(lines, epsilon):
    """At D = 262144 with rms(v - v_old) = .03, and lines that the old policy matches but for noise."""
    numbers, images = 16384, 400  # a sixteenth of the numbers, so four times the width
    generator = torch.Generator().manual_seed(0)
    residual, moved = (torch.randn(images, lines, numbers, generator=generator) for _ in range(2))
    old, velocity, clip = torch.zeros_like(moved), 0.03 * moved, 4 * epsilon
    ratio, plain = (matching_log_ratio(velocity, old, residual, 2, how).mean(1) for how in (True, False))
    assert plain.mean() < -2 * clip and (plain < -clip).float().mean() > 0.8
    above, below = ((side > clip).float().mean().item() for side in (ratio, -ratio))
    assert above == pytest.approx(below, abs=0.08) and 0.05 < above < 0.4
    assert ratio.std().item() == pytest.approx(2 * 0.03 / (numbers * lines) ** 0.5, rel=0.1)


def test_matching_log_ratio_keeps_its_digits_near_the_old_policy():
    velocity, old, target = (x * s for x, s in zip(random(4, 4096), (1e-5, 1.0, 1.0), strict=True))
    velocity = (old + velocity).float()
    exact = matching_log_ratio(velocity.double(), old.float().double(), target.float().double(), 1)
    got = matching_log_ratio(velocity, old.float(), target.float(), 1)
    naive = ((old.float() - target.float()) ** 2).mean(1) - ((velocity - target.float()) ** 2).mean(1)
    assert (got - exact).abs().max() < 0.05 * (naive - exact).abs().max()


def nft_by_hand(velocity, old, state, target, t, advantage, beta):
    """One sample in Python's floats."""
    share = 0.5 + min(max(advantage, -5.0), 5.0) / 10
    total = 0.0
    for weight, sign in ((share, 1), (1 - share, -1)):
        errors = [
            (x - t * (v0 + sign * beta * (v - v0))) - (x - t * u)
            for x, v, v0, u in zip(state, velocity, old, target, strict=True)
        ]
        width = sum(map(abs, errors)) / len(errors)
        total += weight * sum(e * e for e in errors) / len(errors) / width
    return 5 / beta * total


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("advantage", [-7.0, -1.2, 0.0, 2.5])
def test_nft_is_its_definition(beta, advantage):
    velocity, old, state, target = random(1, 6, count=4)
    t = torch.tensor([0.6], dtype=torch.float64)
    got = nft_loss(velocity, old, state, target, t, torch.tensor([advantage]), beta)
    rows = [x[0].tolist() for x in (velocity, old, state, target)]
    assert got.item() == pytest.approx(nft_by_hand(*rows, 0.6, advantage, beta))


def test_nft_moves_towards_good_images_and_away_from_bad_ones():
    old, state, target = random(2, 6)
    velocity = old.clone().requires_grad_()
    nft_loss(velocity, old, state, target, torch.full((2,), 0.5), torch.tensor([3.0, -3.0]), 1.0).sum().backward()
    along = -(velocity.grad * (target - old)).sum(1)
    assert along[0] > 0 > along[1]
    # An average image moves the velocity nowhere: both halves cancel at the old policy.
    velocity.grad = None
    nft_loss(velocity, old, state, target, torch.full((2,), 0.5), torch.zeros(2), 1.0).sum().backward()
    torch.testing.assert_close(velocity.grad, torch.zeros_like(velocity), atol=1e-12, rtol=0)


@pytest.mark.parametrize("step", [1e-6])
def test_gradients_are_finite_differences(step):
    velocity, old, state, target = random(1, 5, count=4, seed=3)
    t, advantage = torch.tensor([0.7], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)

    def widths(v):  # without gradient in the loss, so frozen here too
        return [((t * (w - target)).abs().mean().item()) for w in (v, 2 * old - v)]

    frozen = widths(velocity)

    def by_hand(v):
        share, total = 0.65, 0.0
        for weight, towards, width in zip((share, 1 - share), (v, 2 * old - v), frozen, strict=True):
            total += weight * ((t * (towards - target)) ** 2).mean() / width
        return 5 * total

    leaf = velocity.clone().requires_grad_()
    nft_loss(leaf, old, state, target, t, advantage, 1.0).sum().backward()
    matching = velocity.clone().requires_grad_()
    matching_log_ratio(matching, old, target, 1, centred=False).sum().backward()
    for i in range(5):
        nudge = torch.zeros_like(velocity)
        nudge[0, i] = step
        slope = (by_hand(velocity + nudge) - by_hand(velocity - nudge)) / (2 * step)
        assert leaf.grad[0, i].item() == pytest.approx(slope.item(), rel=1e-5)
        loss = [((velocity + sign * nudge - target) ** 2).mean() for sign in (1, -1)]
        assert matching.grad[0, i].item() == pytest.approx(-((loss[0] - loss[1]) / (2 * step)).item(), rel=1e-5)


def test_nft_where_the_estimate_is_the_image_itself():
    x = torch.ones(1, 3)
    loss = nft_loss(x, x, x, x, torch.tensor([0.5]), torch.tensor([1.0]), 1.0)
    assert loss.item() == 0.0
    assert math.isfinite(loss.item())
