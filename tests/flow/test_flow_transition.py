"""The transitions against the SDE written out by hand, Gaussian moments in closed form, and sampled distributions."""

import math

import pytest
import torch

from trl_unigrpo.flow import (
    Transition,
    cps_transition,
    flow_timesteps,
    ode_transition,
    sde_transition,
    step,
    transition,
)


NOISE_LEVEL = 0.8
GRID = flow_timesteps(25)
INNER_STEPS = range(1, 24)


def euler_maruyama(x, v, t, t_next, noise_level):
    """Paper's eq. (3), one step, term by term: mean and std of x_next."""
    dt = t_next - t
    sigma = noise_level * math.sqrt(t / (1 - t))
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    return x + drift * dt, sigma * math.sqrt(abs(dt))


@pytest.mark.parametrize("k", INNER_STEPS)
@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.3])
def test_sde_step_is_the_equation(k, noise_level):
    t, t_next = GRID[k].item(), GRID[k + 1].item()
    tr = sde_transition(GRID[k], GRID[k + 1], noise_level, GRID[1])
    for x, v in [(0.7, -1.3), (-2.0, 0.4), (0.0, 1.0), (1.0, 0.0)]:
        mean, std = euler_maruyama(x, v, t, t_next, noise_level)
        assert (tr.a * x + tr.b * v).item() == pytest.approx(mean, abs=1e-12)
        assert tr.std.item() == pytest.approx(std, rel=1e-12)


def test_velocity_gain_is_the_same_at_every_time():
    """b = c dt with c = 1 + 0.8^2 / 2 = 1.32 for t < 1, and c = 1 at t = 1."""
    tr = sde_transition(GRID[:-2], GRID[1:-1], NOISE_LEVEL, GRID[1])
    gain = tr.b / (GRID[1:-1] - GRID[:-2])
    assert gain.tolist() == pytest.approx([1.0] + [1.32] * 23, abs=1e-12)


@pytest.mark.parametrize("steps", [10, 24, 25])
@pytest.mark.parametrize("noise_level", [0.5, 0.8, 1.0])
def test_first_step_rule(steps, noise_level):
    grid = flow_timesteps(steps)
    tr = sde_transition(grid[0], grid[1], noise_level, grid[1])
    assert tr.std.item() == pytest.approx(noise_level, abs=1e-14)
    assert tr.a.item() == pytest.approx(1 - noise_level**2 / 2, abs=1e-14)
    assert tr.b.item() == pytest.approx((grid[1] - grid[0]).item(), abs=1e-14)


@pytest.mark.parametrize("k", [0, 1, 7, 20, 23])
def test_sde_moves_gaussian_data_with_the_flow(k):
    """For x_0 ~ N(m, s^2) the velocity is linear, so one step maps a Gaussian to a Gaussian without sampling.

    A marginal-preserving step of size h is off by O(h^2) in mean and variance: halving h quarters the error. With the
    score term's sign, its c factor or the noise wrong, the error is O(h).
    """
    m, s = 0.6, 0.4
    t = min(GRID[k].item(), 0.98)

    def marginal(time):
        return (1 - time) * m, (1 - time) ** 2 * s**2 + time**2

    def errors(h):
        (mean, var), (mean_next, var_next) = marginal(t), marginal(t - h)
        slope = (t - (1 - t) * s**2) / var  # v(x) = slope (x - mean) - m, as E[eps - x_0 | x_t]
        times = torch.tensor([t, t - h], dtype=torch.float64)
        tr = sde_transition(times[0], times[1], NOISE_LEVEL, GRID[1])
        a, b, std = (c.item() for c in tr)
        return abs(a * mean + b * -m - mean_next), abs((a + b * slope) ** 2 * var + std**2 - var_next)

    h = 1e-4 * t * (1 - t)
    for coarse, fine in zip(errors(h), errors(h / 2), strict=True):
        assert coarse < h * 0.01
        assert coarse < 1e-14 or fine / coarse == pytest.approx(0.25, abs=0.02)


def mixture_velocity(x, t, means=(-2.0, 2.0), std=0.5):
    """E[eps - x_0 | x_t = x] for equal parts of N(mean, std^2), exact."""
    t = float(t)
    var = (1 - t) ** 2 * std**2 + t**2
    offsets = torch.stack([x - (1 - t) * mean for mean in means])
    weights = torch.softmax(-offsets.square() / (2 * var), dim=0)
    x_0 = torch.stack([mean + (1 - t) * std**2 / var * d for mean, d in zip(means, offsets, strict=True)])
    return (weights * (t / var * offsets - x_0)).sum(0)


def sample(kinds, grid, num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, generator=generator)
    for k, kind in enumerate(kinds):
        tr = transition(kind, grid[k], grid[k + 1], NOISE_LEVEL, grid[1])
        noise = torch.randn(num_samples, generator=generator)
        x, _ = step(x, mixture_velocity(x, grid[k]), tr, None if kind == "ode" else noise)
    return x


def wasserstein_to_data(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2, x.shape, generator=generator) * 4.0 - 2.0
    data += 0.5 * torch.randn(x.shape, generator=generator)
    return (x.sort().values - data.sort().values).abs().mean().item()


@pytest.mark.parametrize(("kind", "low", "high"), [("ode", 0.0, 0.03), ("sde", 0.0, 0.02), ("cps", 0.06, 0.12)])
def test_sde_ends_in_the_data_law_and_cps_does_not(kind, low, high):
    """Fine steps: ODE and SDE reach the law of the data, a mixture of two Gaussians; CPS in every step does not."""
    num_steps = 200
    x = sample([kind] * (num_steps - 1) + ["ode"], flow_timesteps(num_steps), num_samples=40_000)
    assert low < wasserstein_to_data(x) < high


@pytest.mark.parametrize(("start", "excess"), [(0, 0.075), (1, 0.054), (2, 0.023)])
def test_std_after_the_window(start, excess):
    """Three steps of Flow-SDE at 0.8 leave the latent wider than the schedule; CPS steps do not."""
    t = GRID[start + 3].item()
    expected = math.sqrt((1 - t) ** 2 * (4 + 0.25) + t**2)
    window = range(start, start + 3)
    for kind, target, tolerance in [("sde", excess, 0.005), ("cps", 0.0, 0.01)]:
        kinds = [kind if k in window else "ode" for k in range(start + 3)]
        # 400,000 samples: standard error of the std about 0.1 %.
        measured = sample(kinds, GRID, num_samples=400_000).std().item() / expected - 1
        assert measured == pytest.approx(target, abs=tolerance)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_no_noise_is_euler(kind):
    ends = slice(0, 24)
    quiet = transition(kind, GRID[:-1][ends], GRID[1:][ends], 0.0, GRID[1])
    faint = transition(kind, GRID[:-1][ends], GRID[1:][ends], 1e-7, GRID[1])
    dt = GRID[1:][ends] - GRID[:-1][ends]
    for tr in (quiet, faint):
        torch.testing.assert_close(tr.a, torch.ones_like(dt), rtol=0, atol=1e-12)
        torch.testing.assert_close(tr.b, dt, rtol=0, atol=1e-6)
    assert (quiet.std == 0).all()


@pytest.mark.parametrize("noise_level", [0.0, 0.4, 0.8, 1.0])
def test_cps_keeps_the_amounts_of_image_and_noise(noise_level):
    """With the true velocity eps - x_0, x_next is (1 - t_next) x_0 plus noise of norm t_next."""
    x_0, eps = 1.7, -0.6
    for k in range(25):
        t, t_next = GRID[k].item(), GRID[k + 1].item()
        tr = cps_transition(GRID[k], GRID[k + 1], noise_level)
        mean = (tr.a * ((1 - t) * x_0 + t * eps) + tr.b * (eps - x_0)).item()
        kept_noise = (mean - (1 - t_next) * x_0) / eps
        assert kept_noise >= -1e-12
        assert math.hypot(kept_noise, tr.std.item()) == pytest.approx(t_next, abs=1e-12)
        assert tr.std.item() == pytest.approx(t_next * math.sin(noise_level * math.pi / 2), abs=1e-15)


def test_ode_step_undoes_a_straight_path():
    x_0, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t, t_next = torch.tensor([0.9, 0.5]), torch.tensor([0.3, 0.0])
    x = (1 - t).view(2, 1, 1) * x_0 + t.view(2, 1, 1) * eps
    expected = (1 - t_next).view(2, 1, 1) * x_0 + t_next.view(2, 1, 1) * eps
    torch.testing.assert_close(step(x, eps - x_0, ode_transition(t, t_next))[0], expected)


@pytest.mark.parametrize("kind", ["ode", "sde", "cps"])
def test_any_shape_of_times(kind):
    index = torch.tensor([[0, 1, 2], [4, 5, 6]])
    tr = transition(kind, GRID[index], GRID[index + 1], NOISE_LEVEL, GRID[1])
    assert all(c.shape == (2, 3) and c.dtype == torch.float64 for c in tr)
    for i in range(2):
        for j in range(3):
            k = int(index[i, j])
            one = transition(kind, GRID[k], GRID[k + 1], NOISE_LEVEL, GRID[1])
            assert [c[i, j].item() for c in tr] == [c.item() for c in one]


def test_step_broadcasts_from_the_left_and_returns_float32():
    tr = Transition(
        *(torch.tensor(c, dtype=torch.float64) for c in ([[1.0, 2.0]] * 2, [[3.0, 4.0]] * 2, [[5.0, 6.0]] * 2))
    )
    ones = torch.ones(2, 2, 2, dtype=torch.bfloat16)
    x_next, mean = step(ones, ones, tr, ones)
    assert x_next.dtype == mean.dtype == torch.float32
    assert mean[0].tolist() == [[4.0, 4.0], [6.0, 6.0]]
    assert x_next[1].tolist() == [[9.0, 9.0], [12.0, 12.0]]
    quiet, mean = step(ones, ones, tr)
    assert torch.equal(quiet, mean)


def test_step_computes_in_float32_from_half_precision_inputs():
    generator = torch.Generator().manual_seed(0)
    x, velocity, noise = (torch.randn(2, 64, generator=generator).bfloat16() for _ in range(3))
    tr = sde_transition(GRID[2].expand(2), GRID[3].expand(2), NOISE_LEVEL, GRID[1])
    a, b, std = (c[:, None] for c in tr)
    expected = a * x.double() + b * velocity.double() + std * noise.double()
    torch.testing.assert_close(step(x, velocity, tr, noise)[0].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise_level", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_bad_noise_level(kind, noise_level):
    with pytest.raises(ValueError, match="noise_level"):
        transition(kind, GRID[1], GRID[2], noise_level, GRID[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transition("flow-sde", GRID[1], GRID[2], 0.8, GRID[1]), "ode, sde, cps"),
        (lambda: transition("sde", GRID[1], GRID[2], 0.8), "t_first"),
        (lambda: sde_transition(GRID[0], GRID[1], 0.8, 1.0), "t_first"),
        (lambda: sde_transition(GRID[24], GRID[25], 0.8, GRID[1]), "last step with kind 'ode'"),
        (lambda: cps_transition(GRID[1], GRID[2], 1.5), "a value in \\[0, 1\\]"),
        (lambda: ode_transition(GRID[2], GRID[1]), "t_next in \\[0, t\\)"),
        (lambda: ode_transition(torch.tensor(900.0), torch.tensor(800.0)), "not from 1000"),
        (lambda: ode_transition(GRID[:3], GRID[1:3]), "one shape"),
        (lambda: step(torch.ones(2, 3), torch.ones(2, 4), ode_transition(GRID[1], GRID[2])), "one shape"),
        (lambda: step(torch.ones(2, 3), torch.ones(2, 3), ode_transition(GRID[1:4], GRID[2:5])), "one time per row"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
