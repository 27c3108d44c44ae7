import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from trl_unigrpo.flow import flow_timesteps, sde_window, shift_timesteps


# Nodes of the shift-3 grid written out by hand: 25 real steps, and BAGEL's 25 nodes (24 steps).
FIRST_NODES = {
    25: (1, 0.98630, 0.97183, 0.95652, 0.94030, 0.92308),
    24: (1, 0.98571, 0.97059, 0.95455, 0.93750, 0.91935),
}
LAST_NODES = {25: (0.20690, 0.11111, 0), 24: (0.11538, 0)}


@pytest.mark.parametrize("steps", [25, 24])
def test_listed_nodes(steps):
    nodes = flow_timesteps(steps)
    assert nodes.shape == (steps + 1,) and nodes.dtype == torch.float64
    assert nodes[:6].tolist() == pytest.approx(FIRST_NODES[steps], abs=5e-6)
    assert nodes[-len(LAST_NODES[steps]) :].tolist() == pytest.approx(LAST_NODES[steps], abs=5e-6)


@pytest.mark.parametrize(("steps", "shift"), [(1, 3), (4, 3), (25, 3), (10, 1), (50, 7)])
def test_nodes_against_exact_fractions(steps, shift):
    exact = []
    for i in range(steps + 1):
        u = 1 - Fraction(i, steps)
        exact.append(float(shift * u / (1 + (shift - 1) * u)))
    assert flow_timesteps(steps, shift).tolist() == pytest.approx(exact, abs=1e-15)
    assert exact[0] == 1.0 and exact[-1] == 0.0


def test_shift_composes_and_inverts():
    """The shifts form a group: s then r is s * r, and s then 1 / s is nothing."""
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_timesteps(shift_timesteps(u, 3.0), 2.0), shift_timesteps(u, 6.0))
    torch.testing.assert_close(shift_timesteps(shift_timesteps(u, 3.0), 1 / 3), u)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match="num_inference_steps"):
        flow_timesteps(steps)


@pytest.mark.parametrize("shift", [0.0, -3.0, math.inf, math.nan])
def test_bad_shift(shift):
    with pytest.raises(ValueError, match="shift"):
        flow_timesteps(5, shift)


def test_contiguous_window_has_uniform_start():
    draws = Counter(sde_window((0, 5), 3, seed=(0, i)) for i in range(3000))
    assert set(draws) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    # 1000 expected of each; six standard deviations of a binomial are 155.
    assert all(abs(count - 1000) < 155 for count in draws.values())


def test_scattered_window_is_a_uniform_subset():
    draws = Counter(sde_window((1, 6), 3, mode="scatter", seed=(0, i)) for i in range(3000))
    assert len(draws) == math.comb(5, 3)
    for window, count in draws.items():
        assert list(window) == sorted(set(window)) and window[0] >= 1 and window[-1] <= 5
        assert abs(count - 300) < 100


def test_fixed_window_ignores_the_seed():
    assert {sde_window((2, 6), 3, mode="fixed", seed=i) for i in range(5)} == {(2, 3, 4)}


@pytest.mark.parametrize("mode", ["contiguous", "scatter"])
def test_window_depends_on_the_seed_alone(mode):
    first = [sde_window((0, 9), 3, mode=mode, seed=(7, i)) for i in range(50)]
    torch.manual_seed(1)
    assert [sde_window((0, 9), 3, mode=mode, seed=[7, i]) for i in range(50)] == first
    assert [sde_window((0, 9), 3, mode=mode, seed=(8, i)) for i in range(50)] != first


def test_window_may_fill_its_range():
    for mode in ("contiguous", "scatter", "fixed"):
        assert sde_window((1, 4), 3, mode=mode, seed=5) == (1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 5), 6), "holds 1 to 5 steps"),
        (((0, 5), 0), "holds 1 to 5 steps"),
        (((3, 3), 1), "window_range"),
        (((-1, 3), 1), "window_range"),
        (((0, 5), 3, "random"), "contiguous, scatter, fixed"),
    ],
)
def test_bad_window(arguments, message):
    with pytest.raises(ValueError, match=message):
        sde_window(*arguments)
