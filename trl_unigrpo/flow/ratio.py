"""The image side of what UniGRPO optimises: ratio, clipped surrogate and the two regularisers.

All functions reduce over the latent dims by the *mean*, as every public implementation does: log-ratio, clip range and
regulariser weight keep one meaning only together (see `scaling`).
"""

import torch
from torch import Tensor

from .transition import Transition, expand_left


KL_FORMS = ("exact", "flow_grpo")


def log_ratio(
    x: Tensor,
    x_next: Tensor,
    velocity: Tensor,
    old_velocity: Tensor,
    tr: Transition,
    ratio_norm: bool = True,
) -> Tensor:
    """Log-ratio of one recorded step between the current and the old policy, mean-reduced over the latent.

    With mu = a x + b v, dmu = mu - mu_old = b (v - v_old) and eps = (x_next - mu_old) / std:

        ratio_norm=False   log r  = mean(eps dmu) / std - mean(dmu^2) / (2 std^2)
        ratio_norm=True    log r^ = std (log r + mean(dmu^2) / (2 std^2)) = mean(eps dmu)

    The log-prob of a step is never formed: log r is the difference of the two policies' Gaussian log-probs, divided by
    D, the number of latent dims. It is shifted to the left by the KL and its width depends on std; RatioNorm makes it
    centred (E log r^ = 0 under the old policy) and of the width |b| rms(v - v_old) / sqrt(D), so that one clip range
    fits all steps.
    Both are coded without the difference of two log-probs: in float32 that difference loses the signal.
    Source: RatioNorm is GRPO-Guard's; arXiv 2603.23500, eq. (5). "Mean drift" there is against the old policy.

    Args:
        x: State before the step, (*batch, *latent), as recorded in the rollout (float32).
        x_next: State after it, same shape. Must not have been rounded after the noise was added.
        velocity: Current policy's velocity at x, same shape; carries the gradient.
        old_velocity: Old policy's velocity at x, same shape, from the same forward code; no gradient needed.
        tr: The step's coefficients, shape (*batch), std > 0.
        ratio_norm: Apply RatioNorm.

    Returns:
        (*batch), float32 (float64 if an input is float64).

    Examples:
        >>> from trl_unigrpo.flow import sde_transition, step
        >>> x, v, noise = (torch.full((1, 4), c) for c in (0.5, 0.25, 1.0))
        >>> tr = sde_transition(torch.tensor([0.5]), torch.tensor([0.4]), noise_level=0.8, t_first=0.9)
        >>> x_next, _ = step(x, v, tr, noise)
        >>> log_ratio(x, x_next, v + 0.1, v, tr)  # eps = 1, so this is b * 0.1 = -0.1 * 1.32 * 0.1
        tensor([-0.0132])
    """
    num_batch_dims = tr.std.dim()
    if num_batch_dims == 0:
        raise ValueError("log_ratio needs one transition per row, but tr is 0-dim. Pass times of shape (*batch).")
    if not bool((tr.std > 0).all()):
        raise ValueError("A step without noise has no ratio: tr.std must be above 0. Leave ODE steps out of the loss.")
    x, x_next, velocity, old_velocity = same_float(x, x_next, velocity, old_velocity)
    a, b, std = torch.stack(tr).to(x.dtype).to(x.device)  # in one copy: the host waits for each
    a, b = expand_left(a, x), expand_left(b, x)
    scaled_noise = x_next - (a * x + b * old_velocity)
    drift = b * (velocity - old_velocity)
    normed = latent_mean(scaled_noise * drift, num_batch_dims) / std
    if ratio_norm:
        return normed
    return normed / std - latent_mean(drift.square(), num_batch_dims) / (2.0 * std.square())


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float | None = None
) -> Tensor:
    """PPO's clipped objective as a loss to be minimised, one value per element.

        loss = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A),   r = exp(log_ratio)

    coded with r - 1 = expm1(log_ratio). Clip ranges of the flow are about 1e-6 while float32 numbers next to 1 are
    1e-7 apart: r itself would have some eight values inside the clip range, r - 1 has all of them.
    Source: arXiv 2603.23500, eq. (5).

    Args:
        log_ratio: Any shape.
        advantages: Broadcastable to it.
        epsilon_low: In (0, 1]. See `scaling` for the value.
        epsilon_high: > 0; None means epsilon_low.

    Returns:
        Loss, shape of the two inputs broadcast. Its gradient vanishes where r is past the clip on the side that A
        rewards.

    Examples:
        >>> z = torch.tensor([-2e-6, 5e-7, 2e-6], requires_grad=True)
        >>> clipped_surrogate(z, torch.ones(3), 1e-6).sum().backward()
        >>> z.grad
        tensor([-1.0000, -1.0000,  0.0000])
    """
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    if not (0.0 < epsilon_low <= 1.0 and 0.0 < epsilon_high < float("inf")):
        raise ValueError(
            f"The clip range is [1 - {epsilon_low}, 1 + {epsilon_high}], but needs 0 < epsilon_low <= 1 and "
            "epsilon_high > 0."
        )
    delta = torch.expm1(log_ratio)
    clipped = delta.clamp(-epsilon_low, epsilon_high)
    return -(advantages + torch.minimum(delta * advantages, clipped * advantages))


def velocity_mse(velocity: Tensor, reference_velocity: Tensor, num_batch_dims: int) -> Tensor:
    """Squared distance of the velocity to the reference model's, the paper's regulariser.

        mean over latent dims of (v - v_ref)^2

    It weighs every step alike, where the latent KL vanishes as t goes to 1. Source: arXiv 2603.23500, eq. (8), read
    with the mean: with the sum its weight 1.5e-5 would freeze the policy.

    Args:
        velocity: (*batch, *latent); carries the gradient.
        reference_velocity: Same shape, from the reference model with its own text context.
        num_batch_dims: How many leading dims are batch.

    Returns:
        (*batch), float32 (float64 if an input is float64).

    Examples:
        >>> velocity_mse(torch.zeros(2, 3), torch.ones(2, 3), num_batch_dims=1)
        tensor([1., 1.])
    """
    velocity, reference_velocity = same_float(velocity, reference_velocity)
    return latent_mean((velocity - reference_velocity).square(), num_batch_dims)


def latent_kl(
    velocity: Tensor,
    reference_velocity: Tensor,
    tr: Transition,
    num_batch_dims: int,
    form: str = "exact",
    dt: Tensor | float | None = None,
) -> Tensor:
    """KL between current and reference policy for one noisy step, divided by the number of latent dims.

        exact       mean(dmu^2) / (2 std^2),   dmu = b (v - v_ref)      (KL(N(mu, std^2) || N(mu_ref, std^2)) / D)
        flow_grpo   mean(dmu^2) / (2 sigma_t^2) = exact |dt|

    The second is what Flow-GRPO's code computes: it leaves |dt| out of the variance std^2 = sigma_t^2 |dt|. It is here
    for comparisons and belongs to kind "sde".

    Args:
        velocity: (*batch, *latent); carries the gradient.
        reference_velocity: Same shape.
        tr: The step's coefficients; their shape matches the leading dims of velocity, std > 0.
        num_batch_dims: How many leading dims are batch.
        form: "exact" or "flow_grpo".
        dt: t_next - t (its sign does not matter), shape of tr.std; for "flow_grpo" only.

    Returns:
        (*batch), float32 (float64 if an input is float64).

    Examples:
        >>> from trl_unigrpo.flow import Transition
        >>> tr = Transition(torch.tensor(1.0), torch.tensor(-0.5), torch.tensor(0.5))
        >>> latent_kl(torch.ones(2, 3), torch.zeros(2, 3), tr, num_batch_dims=1)
        tensor([0.5000, 0.5000])
    """
    if form not in KL_FORMS:
        raise ValueError(f"The form of the latent KL is {form!r}, but must be one of {', '.join(KL_FORMS)}.")
    if form == "flow_grpo" and dt is None:
        raise ValueError("The flow_grpo form of the latent KL needs dt = t_next - t.")
    if tr.std.dim() > num_batch_dims:
        raise ValueError(f"tr has {tr.std.dim()} dims, but the batch has only num_batch_dims={num_batch_dims}.")
    if not bool((tr.std > 0).all()):
        raise ValueError("A step without noise has no KL: tr.std must be above 0. Use velocity_mse for ODE steps.")
    velocity, reference_velocity = same_float(velocity, reference_velocity)
    # Coefficients are combined in float64 before they meet the latents.
    weight = tr.b.square() / (2.0 * tr.std.square())
    if form == "flow_grpo":
        weight = weight * torch.as_tensor(dt, dtype=torch.float64, device=weight.device).abs()
    squared = latent_mean((velocity - reference_velocity).square(), num_batch_dims)
    return expand_left(weight, squared) * squared


def same_float(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Check that all shapes agree; promote to float32, or to float64 where one of them has it."""
    if len({tuple(tensor.shape) for tensor in tensors}) > 1:
        raise ValueError(f"Latents and velocities must have one shape, but have {[tuple(t.shape) for t in tensors]}.")
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tuple(tensor.to(torch.float64 if double else torch.float32) for tensor in tensors)


def latent_mean(values: Tensor, num_batch_dims: int) -> Tensor:
    """Mean over the trailing dims, those after the first `num_batch_dims`."""
    if not 0 <= num_batch_dims < values.dim():
        raise ValueError(
            f"num_batch_dims is {num_batch_dims}, but a tensor of shape {tuple(values.shape)} has "
            f"0 to {values.dim() - 1} batch dims beside at least one latent dim."
        )
    return values.flatten(num_batch_dims).mean(dim=-1)
