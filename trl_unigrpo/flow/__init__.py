"""The flow maths of UniGRPO (arXiv 2603.23500) as pure functions of tensors: no model, no trainer.

Read in this order: `schedule` (which times, which steps are noisy), `transition` (one step as a Gaussian),
`ratio` (ratio, clip, regularisers), `scaling` (its constants), `matching` (objectives without noisy steps).
"""

from .matching import (
    line_state,
    line_times,
    matching_log_ratio,
    nft_loss,
)
from .ratio import (
    clipped_surrogate,
    latent_kl,
    log_ratio,
    velocity_mse,
)
from .scaling import scale_with_latents, scale_with_steps
from .schedule import flow_timesteps, sde_window, shift_timesteps
from .transition import (
    Transition,
    cps_transition,
    ode_transition,
    sde_transition,
    step,
    transition,
)


__all__ = [
    "Transition",
    "clipped_surrogate",
    "cps_transition",
    "flow_timesteps",
    "latent_kl",
    "line_state",
    "line_times",
    "log_ratio",
    "matching_log_ratio",
    "nft_loss",
    "ode_transition",
    "scale_with_latents",
    "scale_with_steps",
    "sde_transition",
    "sde_window",
    "shift_timesteps",
    "step",
    "transition",
    "velocity_mse",
]
