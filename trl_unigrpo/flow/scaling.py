"""The paper's clip range and regulariser weight at other image sizes and for other steps.

The width of the log-ratio is a step's |b| (without RatioNorm |b| / std) times rms(v - v_old) / sqrt(D), and the policy
gradient grows with the same factor against the velocity MSE's. A constant that is multiplied by the factor means the
same change of velocity everywhere.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from .schedule import flow_timesteps, window_steps
from .transition import Transition, transition


REFERENCE_DIMS = 262144  # BAGEL at 1024 pixels: 64 x 64 tokens of 64 numbers, where the paper's two constants hold.


def scale_with_latents(value: float, num_latent_dims: int, reference_dims: int = REFERENCE_DIMS) -> float:
    """Carry a clip range or a regulariser weight over to another latent size.

        value(D) = value(D_ref) sqrt(D_ref / D)

    The paper's 1e-6 and 1.5e-5 hold at D = 262144 (BAGEL, 1024 pixels).

    Args:
        value: The value at `reference_dims`.
        num_latent_dims: D >= 1, numbers in one latent, for example tokens times channels.
        reference_dims: D_ref >= 1.

    Examples:
        >>> scale_with_latents(1e-6, 65536)  # 512 pixels; GRPO-Guard's published value there
        2e-06
    """
    if num_latent_dims < 1 or reference_dims < 1:
        raise ValueError(
            f"num_latent_dims is {num_latent_dims} and reference_dims is {reference_dims}, "
            "but a latent has at least 1 number."
        )
    return value * math.sqrt(reference_dims / num_latent_dims)


def ratio_width(tr: Transition, ratio_norm: bool = True) -> Tensor:
    """Give the width of the log-ratio of steps, in units of rms(v - v_old) / sqrt(D): |b|, or |b| / std.

    Args:
        tr: The steps' coefficients, any shape; without RatioNorm std > 0.
        ratio_norm: Whether the log-ratio is RatioNorm'ed.
    """
    return tr.b.abs() if ratio_norm else tr.b.abs() / tr.std


def scale_with_steps(
    value: float,
    num_inference_steps: int = 25,
    timestep_shift: float = 3.0,
    sde_type: str = "sde",
    noise_level: float = 0.8,
    window_range: Sequence[int] = (0, 5),
    window_size: int = 3,
    window_mode: str = "contiguous",
    ratio_norm: bool = True,
) -> float:
    """Carry a clip range or a regulariser weight over to other noisy steps than the paper's.

        value(steps) = value(paper) width(steps) / width(paper)

    with the mean `ratio_width` over the steps that windows hold, as often as they hold them. The paper's steps are the
    defaults (arXiv 2603.23500, Table 3), with a mean |b| of .0198. Fewer steps are longer: ten have 3.2 times that.

    Args:
        value: The value for the paper's steps.
        num_inference_steps, timestep_shift, sde_type, noise_level: Of the sampler, see `transition`.
        window_range, window_size, window_mode: Of the SDE window, see `sde_window`.
        ratio_norm: Whether the log-ratio is RatioNorm'ed.

    Examples:
        >>> scale_with_steps(1e-6)
        1e-06
        >>> round(1e6 * scale_with_steps(1e-6, num_inference_steps=10), 2)
        3.23
    """

    def width(steps: int, shift: float, kind: str, noise: float, window: tuple[int, ...]) -> float:
        grid = flow_timesteps(steps, shift)
        taken = list(window)
        tr = transition(kind, grid[taken], grid[[k + 1 for k in taken]], noise, grid[1])
        return ratio_width(tr, ratio_norm).mean().item()

    own = width(
        num_inference_steps,
        timestep_shift,
        sde_type,
        noise_level,
        window_steps(window_range, window_size, window_mode),
    )
    return value * (own / width(25, 3.0, "sde", 0.8, window_steps((0, 5), 3)))
