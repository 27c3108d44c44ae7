"""Time nodes of the flow and the steps of it that are sampled with noise.

Convention of the whole package: `x_t = (1 - t) x_0 + t eps`, so t = 1 is pure noise and t = 0 the clean latent;
sampling walks from 1 down to 0 and every `dt = t_next - t` is negative.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


WINDOW_MODES = ("contiguous", "scatter", "fixed")


def shift_timesteps(u: Tensor, shift: float) -> Tensor:
    """Move time towards the noisy end, as flow models for large images do.

        t = s u / (1 + (s - 1) u)

    s = 1 changes nothing; the end points 0 and 1 stay where they are for every s.

    Args:
        u: Times in [0, 1], any shape. Computed in float64.
        shift: s > 0, no unit. The paper uses 3.

    Returns:
        Shifted times, float64, same shape.

    Examples:
        >>> shift_timesteps(torch.tensor([1.0, 0.5, 0.0]), shift=3.0)
        tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)
    """
    if not 0.0 < shift < float("inf"):
        raise ValueError(
            f"shift is {shift}, but must be a finite number above 0. Use 1.0 for no shift, 3.0 as the paper."
        )
    u = u.to(torch.float64)
    return shift * u / (1.0 + (shift - 1.0) * u)


def flow_timesteps(num_inference_steps: int, shift: float = 3.0, device: torch.device | str | None = None) -> Tensor:
    """Time nodes of a rollout: `num_inference_steps` real steps, hence one node more.

        u = linspace(1, 0, N + 1),  t = shift_timesteps(u, s)

    "25 steps" means 25 evaluations of the model here. BAGEL's own script counts nodes, so its 25 are 24 steps:
    ask for `num_inference_steps=24` to get its grid.

    Args:
        num_inference_steps: N >= 1, the number of model evaluations.
        shift: See `shift_timesteps`.
        device: Where to put the nodes. The CPU is the right place: the transitions are computed there in float64
            and only then sent to the latents' device.

    Returns:
        (N + 1,) float64, strictly decreasing from 1 to 0.

    Examples:
        >>> flow_timesteps(4, shift=3.0)
        tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000], dtype=torch.float64)
    """
    if (
        isinstance(num_inference_steps, bool)
        or int(num_inference_steps) != num_inference_steps
        or num_inference_steps < 1
    ):
        raise ValueError(f"num_inference_steps is {num_inference_steps!r}, but must be a whole number of at least 1.")
    u = torch.linspace(1.0, 0.0, int(num_inference_steps) + 1, dtype=torch.float64, device=device)
    return shift_timesteps(u, shift)


def sde_window(
    window_range: tuple[int, int],
    size: int,
    mode: str = "contiguous",
    seed: int | Sequence[int] = 0,
) -> tuple[int, ...]:
    """Choose the steps that are sampled with noise and trained; all others are plain Euler steps.

    With range (lo, hi), half open, step k goes from node k to node k + 1:

        contiguous  {start, .., start + size - 1},  start uniform in {lo, .., hi - size}
        scatter     `size` distinct steps of {lo, .., hi - 1}, uniform
        fixed       {lo, .., lo + size - 1}

    The paper's range (0, 5) and size 3 (arXiv 2603.23500, Table 3) read contiguously give {0,1,2}, {1,2,3} or {2,3,4},
    as in Flow-GRPO-Fast. Any choice that does not look at the noise leaves the policy gradient unbiased.

    Args:
        window_range: (lo, hi) with 0 <= lo < hi, in steps.
        size: Number of steps, 1 <= size <= hi - lo.
        mode: "contiguous", "scatter" or "fixed".
        seed: Non-negative int, or several. The same seed gives the same window on every rank and machine, so
            `seed=(args.seed, generation_index)` draws one window per generation batch.

    Returns:
        Sorted step indices.

    Examples:
        >>> sde_window((0, 5), 3, mode="fixed")
        (0, 1, 2)
        >>> sde_window((0, 5), 3, seed=(42, 7)) == sde_window((0, 5), 3, seed=(42, 7))
        True
    """
    lo, hi = _check_window(window_range, size, mode)
    if mode == "fixed":
        return tuple(range(lo, lo + size))
    # default_rng passes ints and sequences of ints through numpy's SeedSequence: neighbouring seeds are independent.
    generator = np.random.default_rng(seed if isinstance(seed, int) else list(seed))
    if mode == "scatter":
        return tuple(sorted(int(k) for k in generator.choice(np.arange(lo, hi), size=size, replace=False)))
    start = int(generator.integers(lo, hi - size, endpoint=True))
    return tuple(range(start, start + size))


def window_steps(window_range: Sequence[int], size: int, mode: str = "contiguous") -> tuple[int, ...]:
    """List the steps that windows may hold, each as often as windows hold it; arguments as for `sde_window`.

    Examples:
        >>> window_steps((0, 5), 3)
        (0, 1, 2, 1, 2, 3, 2, 3, 4)
    """
    lo, hi = _check_window(window_range, size, mode)
    if mode == "scatter":
        return tuple(range(lo, hi))
    starts = range(lo, hi - size + 1) if mode == "contiguous" else (lo,)
    return tuple(step for start in starts for step in range(start, start + size))


def _check_window(window_range: Sequence[int], size: int, mode: str) -> tuple[int, int]:
    lo, hi = (int(bound) for bound in window_range)
    if not 0 <= lo < hi:
        raise ValueError(
            f"window_range is ({lo}, {hi}), but must be (first step, last step + 1) with 0 <= first < last + 1; "
            "the paper uses (0, 5)."
        )
    if not 1 <= size <= hi - lo:
        raise ValueError(
            f"The SDE window has size {size}, but its range ({lo}, {hi}) holds 1 to {hi - lo} steps. "
            "Make the window smaller or the range wider."
        )
    if mode not in WINDOW_MODES:
        raise ValueError(f"The SDE window's mode is {mode!r}, but must be one of {', '.join(WINDOW_MODES)}.")
    return lo, hi
