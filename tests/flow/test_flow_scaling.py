"""The paper's two constants at other latent sizes and for other steps."""

from collections import Counter

import pytest
import torch

from tests.helpers.oracle import step_scale
from trl_unigrpo import UniGRPOConfig
from trl_unigrpo.flow import scale_with_latents, scale_with_steps, sde_window
from trl_unigrpo.flow.objectives import clipped, constants, of_size
from trl_unigrpo.flow.schedule import window_steps


def test_scaling_with_the_latent():
    assert scale_with_latents(1e-6, 262144) == 1e-6
    assert scale_with_latents(1e-6, 65536) == pytest.approx(2e-6, rel=1e-15)
    assert scale_with_latents(1e-6, 256) == pytest.approx(3.2e-5, rel=1e-15)
    assert scale_with_latents(1.5e-5, 256) == pytest.approx(4.8e-4, rel=1e-15)
    assert scale_with_latents(5e-4, 72, reference_dims=1) == pytest.approx(5.9e-5, rel=0.01)


def test_scaling_with_the_steps():
    """Recorded: mean |b| is .0198 for the paper's steps; ten have 3.23 times that, CPS 4.86 times."""
    assert scale_with_steps(1.5e-5) == 1.5e-5
    assert scale_with_steps(0.0198, num_inference_steps=10) == pytest.approx(3.23 * 0.0198, rel=2e-3)
    assert scale_with_steps(1.0, num_inference_steps=10, sde_type="cps") == pytest.approx(4.86, rel=2e-3)
    # One step from t = 1 on a straight grid of four, where b = dt; the paper's first step has b = -.0137.
    first = scale_with_steps(1.0, 4, 1.0, window_range=(0, 1), window_size=1)
    paper = scale_with_steps(1.0, window_range=(0, 1), window_size=1)
    assert first / paper == pytest.approx(0.25 / (1 - 72 / 73), rel=1e-12)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("size", [3, 5])
def test_scaling_with_the_steps_is_that_of_the_oracle(kind, normed, size):
    got = scale_with_steps(1.0, 6, sde_type=kind, ratio_norm=normed, window_size=size)
    settings = {"sde_type": kind, "ratio_norm": normed, "sde_window_size": size}
    assert got == pytest.approx(step_scale(settings), rel=1e-9)


@pytest.mark.parametrize("mode", ["contiguous", "scatter", "fixed"])
def test_steps_of_windows_are_listed_as_often_as_windows_hold_them(mode):
    drawn = Counter(step for seed in range(3000) for step in sde_window((1, 6), 3, mode, seed))
    listed = Counter(window_steps((1, 6), 3, mode))
    assert drawn.keys() == listed.keys()
    for step, count in listed.items():
        assert drawn[step] / drawn.total() == pytest.approx(count / listed.total(), abs=0.015)


def test_constants_of_a_run():
    def of(numbers=256, **settings):
        args = UniGRPOConfig(output_dir="", use_cpu=True, **settings)
        return tuple(of_size(args, constant, torch.empty(3, 2, numbers // 2)) for constant in constants(args))

    assert of(262144) == (1e-6, 1.5e-5)
    assert of(65536, image_size=512) == (2e-6, 3e-5)
    assert of(num_inference_steps=10) == pytest.approx((3.2e-5 * 3.23, 4.8e-4 * 3.23), rel=2e-3)
    assert of(num_inference_steps=10, sde_type="cps") == pytest.approx((3.2e-5 * 4.86, 4.8e-4 * 4.86), rel=2e-3)
    rounds = of(num_inference_steps=[25, 10], num_rounds=2)
    assert rounds == pytest.approx((3.2e-5 * (1 + 3.23) / 2, 4.8e-4 * (1 + 3.23) / 2), rel=2e-3)
    # Lines have no steps; what is not scaled is what the configuration says.
    assert of(num_inference_steps=10, image_objective="fpo") == pytest.approx((32 * 3e-5, 32 * 1.5e-5))
    assert of(num_inference_steps=10, image_objective="awm")[0] == pytest.approx(32 * 1e-4)
    assert of(num_inference_steps=10, scale_with_latents=False) == (1e-6, 1.5e-5)
    assert of(flow_regularizer="none")[1] == 0
    assert of(num_inference_steps=1, flow_weight=0.0)[0] == pytest.approx(3.2e-5)  # no window has to fit


def test_scaled_clip_means_the_same_velocity_change_for_steps_of_any_length():
    """A change of velocity whose log-ratio stays inside of the clip with 25 steps does so with ten, and with CPS."""
    from trl_unigrpo.flow import flow_timesteps, log_ratio, step, transition

    shares = []
    for steps, kind in ((25, "sde"), (10, "sde"), (10, "cps")):
        grid, numbers = flow_timesteps(steps), 256
        x, noise, velocity, moved = torch.randn(4, 9 * 2000, numbers, generator=torch.Generator().manual_seed(steps))
        taken = torch.tensor(window_steps((0, 5), 3)).repeat(2000)
        tr = transition(kind, grid[taken], grid[taken + 1], 0.8, grid[1])
        x_next = step(x, velocity, tr, noise)[0]
        ratio = log_ratio(x, x_next, velocity + 0.026 * moved, velocity, tr)
        clip = scale_with_steps(scale_with_latents(1e-6, numbers), steps, sde_type=kind)
        shares.append((ratio.abs() > clip).double().mean().item())
    assert shares == pytest.approx([shares[0]] * 3, abs=0.05) and 0.2 < shares[0] < 0.5


def test_share_without_gradient_is_where_the_gradient_is_zero():
    ratio = (3e-4 * torch.randn(500, generator=torch.Generator().manual_seed(1))).requires_grad_()
    advantages = torch.randn(500, generator=torch.Generator().manual_seed(2))
    losses, metrics = clipped(ratio, advantages, 2e-4)
    losses.sum().backward()
    assert metrics["flow/no_gradient_frac"] == (ratio.grad == 0).float().mean()
    assert metrics["flow/clip_frac"] == (torch.expm1(ratio.detach()).abs() > 2e-4).float().mean()
    assert 0.1 < metrics["flow/no_gradient_frac"] < metrics["flow/clip_frac"] - 0.1
