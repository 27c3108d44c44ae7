"""Ratio, clip and regularisers against torch.distributions, float64 log-probs and moments derived by hand."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from trl_unigrpo.flow import (
    Transition,
    clipped_surrogate,
    flow_timesteps,
    latent_kl,
    log_ratio,
    scale_with_latents,
    sde_transition,
    step,
    transition,
    velocity_mse,
)


GRID = flow_timesteps(25)


def recorded_step(k, batch, latent, rms, kind="sde", dtype=torch.float64, seed=0):
    """Random state, old velocity and a new one at distance `rms`; x_next sampled from the old policy."""
    generator = torch.Generator().manual_seed(seed)
    x, old, delta, noise = (torch.randn(*batch, *latent, generator=generator, dtype=dtype) for _ in range(4))
    t, t_next = GRID[k].expand(batch), GRID[k + 1].expand(batch)
    tr = transition(kind, t, t_next, 0.8, GRID[1])
    view = tr.a.shape + (1,) * len(latent)
    x_next = (tr.a.view(view) * x + tr.b.view(view) * old + tr.std.view(view) * noise).to(dtype)
    return x, x_next, old + rms * delta, old, tr


def log_probs(x, x_next, velocity, tr, latent_dims):
    """Mean over the latent of the Gaussian's log-density at x_next, float64, from torch.distributions."""
    a, b, std = (c.view(c.shape + (1,) * latent_dims) for c in tr)
    density = Normal(a * x.double() + b * velocity.double(), std.expand(x.shape)).log_prob(x_next.double())
    return density.flatten(tr.a.dim()).mean(-1)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("k", [0, 1, 4, 20])
def test_plain_ratio_is_the_difference_of_log_probs(kind, k):
    x, x_next, new, old, tr = recorded_step(k, (3, 2), (5, 4), 0.3, kind)
    expected = log_probs(x, x_next, new, tr, 2) - log_probs(x, x_next, old, tr, 2)
    torch.testing.assert_close(log_ratio(x, x_next, new, old, tr, ratio_norm=False), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("k", [0, 1, 4, 20])
def test_ratio_norm_is_log_prob_difference_plus_bias(kind, k):
    """GRPO-Guard's form: std * (log p - log p_old + mean(dmu^2) / (2 std^2))."""
    x, x_next, new, old, tr = recorded_step(k, (3, 2), (5, 4), 0.3, kind)
    difference = log_probs(x, x_next, new, tr, 2) - log_probs(x, x_next, old, tr, 2)
    drift = (tr.b.view(3, 2, 1, 1) * (new - old)).square().flatten(2).mean(-1)
    expected = tr.std * (difference + drift / (2 * tr.std**2))
    torch.testing.assert_close(log_ratio(x, x_next, new, old, tr), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("k", [0, 2, 4])
def test_moments_of_the_two_ratios(k):
    """RatioNorm: mean 0, std |b| rms(dv) / sqrt(D). Plain: mean -mean(dmu^2) / (2 std^2), the left shift."""
    rows, dims, rms = 4000, 64, 0.3
    generator = torch.Generator().manual_seed(k)
    x, old, delta = (torch.randn(1, dims, generator=generator, dtype=torch.float64).expand(rows, -1) for _ in range(3))
    new = old + rms * delta
    tr = sde_transition(GRID[k].expand(rows), GRID[k + 1].expand(rows), 0.8, GRID[1])
    mean_old = tr.a[:, None] * x + tr.b[:, None] * old
    x_next = mean_old + tr.std[:, None] * torch.randn(rows, dims, generator=generator, dtype=torch.float64)
    drift = tr.b[0].abs() * (new - old)[0].square().mean().sqrt()

    normed = log_ratio(x, x_next, new, old, tr)
    width = (drift / math.sqrt(dims)).item()
    assert normed.mean().item() == pytest.approx(0.0, abs=5 * width / math.sqrt(rows))
    assert normed.std().item() == pytest.approx(width, rel=0.06)

    plain = log_ratio(x, x_next, new, old, tr, ratio_norm=False)
    shift, plain_width = (-(drift**2) / (2 * tr.std[0] ** 2)).item(), width / tr.std[0].item()
    assert plain.mean().item() == pytest.approx(shift, abs=5 * plain_width / math.sqrt(rows))
    assert plain.std().item() == pytest.approx(plain_width, rel=0.06)


def test_float32_precision_at_full_size():
    """D = 262144, rms(dv) = 0.01: signal 3.4e-7, clip 1e-6. The direct form is off by 1e-10, log-probs by 1e-8."""
    x, x_next, new, old, tr = recorded_step(2, (16,), (4096, 64), 0.01, dtype=torch.float32)
    exact = log_ratio(*(value.double() for value in (x, x_next, new, old)), tr)
    assert exact.std().item() == pytest.approx(3.4e-7, rel=0.6)

    direct = log_ratio(x, x_next, new, old, tr)
    assert direct.dtype == torch.float32
    assert (direct.double() - exact).abs().max().item() < 5e-10

    a, b, std = (c.float().view(-1, 1, 1) for c in tr)
    naive = [-(((x_next - a * x - b * v) / std).square() / 2).flatten(1).mean(1) for v in (new, old)]
    bias = (b * (new - old)).square().flatten(1).mean(1) / (2 * tr.std.float() ** 2)
    detour = tr.std.float() * (naive[0] - naive[1] + bias)
    assert (detour.double() - exact).abs().max().item() > 5e-9


def test_step_and_log_ratio_agree_on_the_mean():
    """A step taken in float32 by `step` gives mean(noise * dmu) back."""
    generator = torch.Generator().manual_seed(3)
    x, old, delta, noise = (torch.randn(4, 64, 16, generator=generator) for _ in range(4))
    tr = sde_transition(GRID[1].expand(4), GRID[2].expand(4), 0.8, GRID[1])
    x_next, _ = step(x, old, tr, noise)
    expected = (noise * tr.b.float().view(4, 1, 1) * 0.1 * delta).flatten(1).mean(1)
    torch.testing.assert_close(log_ratio(x, x_next, old + 0.1 * delta, old, tr), expected, rtol=1e-3, atol=1e-9)


def test_equal_velocities_give_exactly_zero():
    x, x_next, _, old, tr = recorded_step(1, (3,), (8, 4), 0.0, dtype=torch.float32)
    for ratio_norm in (True, False):
        assert (log_ratio(x, x_next, old, old, tr, ratio_norm) == 0).all()


def test_gradient_of_the_normed_ratio():
    """d log r^ / dv = b eps / D, whatever the std."""
    x, x_next, new, old, tr = recorded_step(3, (2,), (6,), 0.1)
    new.requires_grad_()
    log_ratio(x, x_next, new, old, tr).sum().backward()
    noise = (x_next - tr.a[:, None] * x - tr.b[:, None] * old) / tr.std[:, None]
    torch.testing.assert_close(new.grad, tr.b[:, None] * noise / 6)


def test_half_precision_velocities_are_promoted():
    x, x_next, new, old, tr = recorded_step(2, (2,), (8,), 0.5, dtype=torch.float32)
    half = log_ratio(x, x_next, new.bfloat16(), old.bfloat16(), tr)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, log_ratio(x, x_next, new.bfloat16().float(), old.bfloat16().float(), tr))


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [(1.0, [-1.0, -1.0, -1.0, 0.0]), (-1.0, [0.0, 1.0, 1.0, 1.0]), (0.0, [0.0, 0.0, 0.0, 0.0])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_stops_only_the_overconfident_side(advantage, expected, dtype):
    z = torch.tensor([-2e-6, -5e-7, 5e-7, 2e-6], dtype=dtype, requires_grad=True)
    clipped_surrogate(z, torch.tensor(advantage, dtype=dtype), 1e-6).sum().backward()
    assert z.grad.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("advantage", [1.3, -0.7])
def test_surrogate_is_ppo(advantage):
    """Value and gradient of min(r A, clip(r) A) written out case by case, asymmetric clip."""
    low, high = 0.2, 0.28
    for value in (-1.0, -0.3, -0.1, 0.0, 0.1, 0.2, 0.3, 1.0):
        z = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        loss = clipped_surrogate(z, torch.tensor(advantage, dtype=torch.float64), low, high)
        loss.backward()
        ratio = math.exp(value)
        clipped_away = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        limit = 1 + high if advantage > 0 else 1 - low
        assert loss.item() == pytest.approx(-advantage * (limit if clipped_away else ratio), abs=1e-12)
        assert z.grad.item() == pytest.approx(0.0 if clipped_away else -advantage * ratio, abs=1e-12)


def test_tiny_ratios_keep_their_size_in_float32():
    """1 + 1e-9 is 1 in float32; the gradient and the clip decision must still see 1e-9."""
    z = torch.tensor([1e-9, 3e-9], requires_grad=True)
    clipped_surrogate(z, torch.ones(2), 2e-9).sum().backward()
    assert z.grad.tolist() == [-1.0, 0.0]


def test_surrogate_broadcasts_advantages():
    assert clipped_surrogate(torch.zeros(4, 3), torch.ones(4, 1), 1e-6).shape == (4, 3)


def test_velocity_mse_by_hand():
    velocity = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]])
    assert velocity_mse(velocity, torch.zeros(2, 2, 2), 1).tolist() == [7.5, 1.0]
    assert velocity_mse(velocity, torch.zeros(2, 2, 2), 2).tolist() == [[2.5, 12.5], [0.0, 2.0]]
    half = velocity_mse(velocity.bfloat16().requires_grad_(), torch.zeros(2, 2, 2), 1)
    assert half.dtype == torch.float32 and half.requires_grad


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("k", [0, 3, 12, 23])
def test_exact_kl_is_torch_distributions(kind, k):
    x, _, new, old, tr = recorded_step(k, (3, 2), (5, 4), 0.3, kind)
    a, b, std = (c.view(3, 2, 1, 1) for c in tr)
    std = std.expand(x.shape)
    expected = kl_divergence(Normal(a * x + b * new, std), Normal(a * x + b * old, std)).flatten(2).mean(-1)
    torch.testing.assert_close(latent_kl(new, old, tr, 2), expected, rtol=1e-10, atol=0)


def test_kl_weights_of_the_first_steps():
    """The exact KL vanishes as t goes to 1: relative weights of steps 0..4 (and 12, 23 for its growth afterwards)."""
    steps = torch.tensor([0, 1, 2, 3, 4, 12, 23])
    tr = sde_transition(GRID[steps], GRID[steps + 1], 0.8, GRID[1])
    kl = latent_kl(torch.ones(7, 9), torch.zeros(7, 9), tr, 1)
    assert (kl / kl[4]).tolist() == pytest.approx([0.10, 0.18, 0.41, 0.67, 1.0, 8.5, 336], rel=0.05)


def test_flow_grpo_kl_leaves_dt_out_of_the_variance():
    """Denominator 2 sigma_t^2 with sigma_t = 0.8 sqrt(t / (1 - t)), written out."""
    k, new, old = 4, torch.full((2, 6), 0.3, dtype=torch.float64), torch.full((2, 6), 0.1, dtype=torch.float64)
    t, dt = GRID[k].item(), (GRID[k + 1] - GRID[k]).item()
    tr = sde_transition(GRID[k], GRID[k + 1], 0.8, GRID[1])
    expected = (1.32 * dt * 0.2) ** 2 / (2 * 0.64 * t / (1 - t))
    assert latent_kl(new, old, tr, 1, "flow_grpo", dt).tolist() == pytest.approx([expected] * 2, rel=1e-12)
    assert latent_kl(new, old, tr, 1, "flow_grpo", torch.tensor(-dt)).tolist() == pytest.approx(
        [expected] * 2, rel=1e-6
    )


def test_scaled_clip_means_the_same_velocity_change_at_any_size():
    """The share of steps outside the scaled clip does not depend on D."""
    shares = []
    for dims in (64, 1024):
        x, x_next, new, old, tr = recorded_step(2, (20_000 * 64 // dims,), (dims,), 0.03, seed=dims)
        outside = log_ratio(x, x_next, new, old, tr).abs() > scale_with_latents(1e-6, dims)
        shares.append(outside.double().mean().item())
    assert shares[0] == pytest.approx(shares[1], abs=0.06) and 0.1 < shares[0] < 0.9


X, TR = torch.ones(2, 3), sde_transition(GRID[1].expand(2), GRID[2].expand(2), 0.8, GRID[1])
ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_ratio(X, X, X, X, sde_transition(GRID[1], GRID[2], 0.8, GRID[1])), "one transition per row"),
        (lambda: log_ratio(X, X, X, X, transition("ode", GRID[1:3], GRID[2:4])), "std must be above 0"),
        (lambda: log_ratio(X, X, X, torch.ones(2, 4), TR), "one shape"),
        (lambda: log_ratio(X[:1], X[:1], X[:1], X[:1], TR), "one time per row"),
        (lambda: log_ratio(X[:, 0], X[:, 0], X[:, 0], X[:, 0], TR), "at least one latent dim"),
        (lambda: clipped_surrogate(ONE, ONE, 0.0), "clip range"),
        (lambda: clipped_surrogate(ONE, ONE, 1e-6, -1e-6), "clip range"),
        (lambda: velocity_mse(X, X, 2), "at least one latent dim"),
        (lambda: velocity_mse(X, X[:1], 1), "one shape"),
        (lambda: latent_kl(X, X, TR, 1, "approx"), "exact, flow_grpo"),
        (lambda: latent_kl(X, X, TR, 1, "flow_grpo"), "needs dt"),
        (lambda: latent_kl(X, X, Transition(ONE, ONE, 0 * ONE), 1), "std must be above 0"),
        (lambda: latent_kl(X, X, TR, 0), "num_batch_dims"),
        (lambda: scale_with_latents(1e-6, 0), "num_latent_dims"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
