"""One step of the flow as a Gaussian: x_next = a x + b v + std eps.

Every sampler used here, deterministic or noisy, is linear in the state x and the velocity v, so three numbers per step
say everything: the rollout, the log-ratio and the KL all read the same `Transition` and cannot disagree.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


TRANSITION_KINDS = ("ode", "sde", "cps")


class Transition(NamedTuple):
    """Coefficients of `x_next = a x + b v + std eps`, `eps ~ N(0, I)`; float64, all of the same shape as t."""

    a: Tensor
    b: Tensor
    std: Tensor


def ode_transition(t: Tensor, t_next: Tensor) -> Transition:
    """Euler step of the flow ODE: `x_next = x + (t_next - t) v`.

    Args:
        t: Time before the step, in (0, 1], any shape.
        t_next: Time after it, in [0, t), same shape.

    Returns:
        `a = 1`, `b = t_next - t` (negative), `std = 0`.

    Examples:
        >>> ode_transition(torch.tensor(1.0), torch.tensor(0.5)).b
        tensor(-0.5000, dtype=torch.float64)
    """
    t, t_next = _times(t, t_next)
    return Transition(torch.ones_like(t), t_next - t, torch.zeros_like(t))


def sde_transition(t: Tensor, t_next: Tensor, noise_level: float, t_first: Tensor | float) -> Transition:
    """One Euler-Maruyama step of Flow-SDE, which has the ODE's marginals in the limit of small steps.

        dx = [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt + sigma_t dw,   sigma_t = noise_level sqrt(t / (1 - t))

        a   = 1 + sigma_t^2 dt / (2t)
        b   = (1 + sigma_t^2 (1 - t) / (2t)) dt      (= (1 + noise_level^2 / 2) dt for every t < 1)
        std = sigma_t sqrt(-dt)

    At t = 1, where sigma_t is infinite, its 1 - t becomes 1 - t_first: then std = noise_level exactly,
    a = 1 - noise_level^2 / 2 and b = dt for the first step. noise_level = 0 gives the Euler step.
    Source: arXiv 2603.23500, eq. (3); the t = 1 rule is that of the public Flow-GRPO code.

    Args:
        t: Time before the step, in (0, 1], any shape, for example (B, K).
        t_next: Time after it, in (0, t), same shape. The last step (t_next = 0) is refused: it would leave noise of
            std noise_level * sqrt(t) in the finished image.
        noise_level: >= 0. The paper uses 0.8.
        t_first: `flow_timesteps(...)[1]`, the node after t = 1, in [0, 1).

    Returns:
        Coefficients of the step, float64.

    Examples:
        >>> from trl_unigrpo.flow import flow_timesteps
        >>> grid = flow_timesteps(25)
        >>> sde_transition(grid[0], grid[1], noise_level=0.8, t_first=grid[1]).std
        tensor(0.8000, dtype=torch.float64)
    """
    t, t_next = _times(t, t_next)
    _check_noise_level(noise_level)
    first = float(t_first)
    if not 0.0 <= first < 1.0:
        raise ValueError(
            f"t_first is {first}, but must lie in [0, 1). Pass flow_timesteps(...)[1], the node after t = 1."
        )
    if noise_level > 0 and bool((t_next <= 0).any()):
        raise ValueError(
            "An SDE step may not end at t = 0: its noise would stay in the finished image. "
            "Take the last step with kind 'ode', or end the SDE window before it."
        )
    dt = t_next - t
    one_minus_t = torch.where(t >= 1.0, torch.full_like(t, 1.0 - first), 1.0 - t)
    sigma_squared = noise_level**2 * t / one_minus_t
    a = 1.0 + sigma_squared * dt / (2.0 * t)
    b = (1.0 + sigma_squared * (1.0 - t) / (2.0 * t)) * dt
    return Transition(a, b, torch.sqrt(sigma_squared * -dt))


def cps_transition(t: Tensor, t_next: Tensor, noise_level: float) -> Transition:
    """Coefficients-preserving step: part of the predicted noise is replaced by fresh noise, its amount is kept.

        x_0 = x - t v,   eps_hat = x + (1 - t) v
        std = t_next sin(noise_level pi / 2),   r = t_next cos(noise_level pi / 2)
        x_next = (1 - t_next) x_0 + r eps_hat + std eps

        a = (1 - t_next) + r,   b = (1 - t) r - t (1 - t_next)

    r^2 + std^2 = t_next^2, so the latent carries exactly the noise that the model expects at t_next, for steps of any
    size. In exchange, many such steps in a row do not keep the data's distribution. Source: Flow-CPS
    (Coefficients-Preserving Sampling), the `cps` option of Flow-GRPO.

    Args:
        t: Time before the step, in (0, 1], any shape.
        t_next: Time after it, in [0, t), same shape.
        noise_level: In [0, 1]: the share of a quarter turn. 0 gives the Euler step, 1 replaces all noise.

    Returns:
        Coefficients of the step, float64.

    Examples:
        >>> tr = cps_transition(torch.tensor(0.8), torch.tensor(0.5), noise_level=1.0)
        >>> [round(float(c), 4) for c in tr]  # all noise is fresh: x_next = (1 - 0.5) x_0 + 0.5 eps
        [0.5, -0.4, 0.5]
    """
    t, t_next = _times(t, t_next)
    _check_noise_level(noise_level)
    if noise_level > 1:
        raise ValueError(
            f"noise_level is {noise_level}, but a CPS step takes a value in [0, 1]: "
            "it is the share of the noise's quarter turn. Lower it, or use sde_type='sde'."
        )
    angle = noise_level * math.pi / 2.0
    kept = t_next * math.cos(angle)
    a = (1.0 - t_next) + kept
    b = (1.0 - t) * kept - t * (1.0 - t_next)
    return Transition(a, b, t_next * math.sin(angle))


def transition(
    kind: str, t: Tensor, t_next: Tensor, noise_level: float = 0.0, t_first: Tensor | float | None = None
) -> Transition:
    """The transition of the given kind: "ode", "sde" or "cps". See the three functions of those names.

    Args:
        kind: Which sampler.
        t: Time before the step, any shape.
        t_next: Time after it, same shape.
        noise_level: Used by "sde" and "cps".
        t_first: Used and needed by "sde".

    Examples:
        >>> transition("ode", torch.tensor(1.0), torch.tensor(0.5)).std
        tensor(0., dtype=torch.float64)
    """
    if kind == "ode":
        return ode_transition(t, t_next)
    if kind == "sde":
        if t_first is None:
            raise ValueError("An SDE step needs t_first for its rule at t = 1. Pass flow_timesteps(...)[1].")
        return sde_transition(t, t_next, noise_level, t_first)
    if kind == "cps":
        return cps_transition(t, t_next, noise_level)
    raise ValueError(f"The kind of transition is {kind!r}, but must be one of {', '.join(TRANSITION_KINDS)}.")


def step(x: Tensor, velocity: Tensor, tr: Transition, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Take one step: `mean = a x + b v`, `x_next = mean + std noise`.

    Done and returned in float32 whatever the inputs are: a bfloat16 `x_next` no longer fits the noise that made it,
    and shifts every log-ratio by more than the clip range.

    Args:
        x: (*batch, *latent).
        velocity: Same shape as x, any floating dtype.
        tr: Coefficients whose shape matches the leading dims of x; a 0-dim one serves all of x.
        noise: Standard normal, same shape as x; None adds no noise.

    Returns:
        `(x_next, mean)`, both float32 in the shape of x; without noise they are the same tensor.

    Examples:
        >>> tr = ode_transition(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0]))
        >>> step(torch.ones(2, 3), torch.ones(2, 3), tr)[0][:, 0]
        tensor([0.5000, 0.0000])
    """
    if velocity.shape != x.shape or (noise is not None and noise.shape != x.shape):
        found = f"x {tuple(x.shape)}, velocity {tuple(velocity.shape)}"
        found += "" if noise is None else f", noise {tuple(noise.shape)}"
        raise ValueError(f"x, velocity and noise must have one shape, but are {found}.")
    x = x.float()
    mean = expand_left(tr.a, x) * x + expand_left(tr.b, x) * velocity.float()
    if noise is None:
        return mean, mean
    return mean + expand_left(tr.std, x) * noise.float(), mean


def expand_left(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append dims to `coefficient` so that it broadcasts over the trailing dims of x, in x's dtype and device."""
    if coefficient.dim() > x.dim() or coefficient.shape != x.shape[: coefficient.dim()]:
        raise ValueError(
            f"The coefficients have shape {tuple(coefficient.shape)}, which must equal the leading dims of the "
            f"latents {tuple(x.shape)}. Give one time per row."
        )
    # dtype first: some accelerators have no float64.
    scaled = coefficient.to(x.dtype).to(x.device)
    return scaled.reshape(coefficient.shape + (1,) * (x.dim() - coefficient.dim()))


def _times(t: Tensor | float, t_next: Tensor | float) -> tuple[Tensor, Tensor]:
    t, t_next = (torch.as_tensor(value).to(torch.float64) for value in (t, t_next))
    if t.shape != t_next.shape:
        raise ValueError(f"t and t_next must have one shape, but have {tuple(t.shape)} and {tuple(t_next.shape)}.")
    if not bool(((t > 0) & (t <= 1) & (t_next >= 0) & (t_next < t)).all()):
        raise ValueError(
            f"A step goes from t in (0, 1] down to t_next in [0, t), but got t = {t.flatten()[:4].tolist()} and "
            f"t_next = {t_next.flatten()[:4].tolist()}. Times run from 1 (noise) to 0 (image), not from 1000."
        )
    return t, t_next


def _check_noise_level(noise_level: float) -> None:
    if not 0.0 <= noise_level < float("inf"):
        raise ValueError(
            f"noise_level is {noise_level}, but must be a finite number of at least 0. The paper uses 0.8."
        )
