"""What the image expert is trained on: the noisy steps of its own sampling (FlowGRPO), or straight lines to the images
that it painted (FPO, AWM, DiffusionNFT).

Shapes: B samples, K states of each, K' of these at a time, `latent` the model's own latent dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import (
    Transition,
    clipped_surrogate,
    flow_timesteps,
    latent_kl,
    line_state,
    line_times,
    log_ratio,
    matching_log_ratio,
    nft_loss,
    transition,
    velocity_mse,
)
from .sampler import FlowRecord


Loss = tuple[Tensor, dict[str, Tensor]]
"""A scalar to be minimised, and metrics by name."""


@dataclass
class States:
    """The states of a micro-batch at which velocities are trained, as [`FlowRecord`] keeps them of each sample."""

    latents: Tensor
    next_latents: Tensor
    velocities: Tensor
    timesteps: Tensor
    next_timesteps: Tensor

    @classmethod
    def of(cls, records: Sequence[FlowRecord], steps: slice, device: torch.device) -> "States":
        """(B, K', ...) of the chosen steps; times stay on the CPU."""

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(record, name)[steps] for record in records])

        tensors = {name: stacked(name).to(device) for name in ("latents", "next_latents", "velocities")}
        return cls(**tensors, timesteps=stacked("timesteps").cpu(), next_timesteps=stacked("next_timesteps").cpu())


class FlowGRPO:
    """
    The clipped ratio of the recorded SDE steps, RatioNorm'ed (arXiv 2603.23500, eq. 5).

    Args:
        args: the configuration.
        epsilon: clip range at the latent size of this run.
    """

    stochastic = True
    """Whether images are sampled with noisy steps, which are then the states."""
    pools_steps = False
    """Whether the loss of one state needs the velocities of all of its sample."""

    def __init__(self, args: Any, epsilon: float):
        self.args, self.epsilon = args, epsilon
        self.first_node = flow_timesteps(args.num_inference_steps, args.timestep_shift)[1]

    def states(self, records: Sequence[FlowRecord], generators: Sequence[torch.Generator]) -> list[FlowRecord]:
        """The records to train on, made from those of the rollout."""
        return list(records)

    def transition(self, states: States) -> Transition:
        """The recorded steps as Gaussians."""
        args = self.args
        return transition(args.sde_type, states.timesteps, states.next_timesteps, args.noise_level, self.first_node)

    def loss(self, velocity: Tensor, old: Tensor, states: States, advantages: Tensor) -> Loss:
        """
        Args:
            velocity: (B, K', *latent), carries the gradient.
            old: same shape, of the policy that sampled the images.
            states: where both were predicted.
            advantages: (B, 1).
        """
        tr = self.transition(states)
        ratio = log_ratio(states.latents, states.next_latents, velocity, old, tr, self.args.ratio_norm)
        return clipped(ratio, advantages, self.epsilon)

    def regularizer(self, velocity: Tensor, reference: Tensor, states: States) -> Tensor:
        """Mean over samples, steps and numbers of the distance to the reference model."""
        kind = self.args.flow_regularizer
        if kind == "velocity_mse":
            return velocity_mse(velocity, reference, num_batch_dims=2).mean()
        form, dt = "exact" if kind == "latent_kl" else "flow_grpo", states.next_timesteps - states.timesteps
        tr = self.transition(states)
        return latent_kl(velocity, reference, tr, num_batch_dims=2, form=form, dt=dt).mean()


class Matching(FlowGRPO):
    """
    States on straight lines from noise to the finished image, `matching_samples` of them per image; images are sampled
    by the ODE. In their records `next_latents` is the noise, at time 1, and `velocities` the line's.
    """

    stochastic = False

    def states(self, records: Sequence[FlowRecord], generators: Sequence[torch.Generator]) -> list[FlowRecord]:
        args, states = self.args, []
        for record, generator in zip(records, generators, strict=True):
            image = record.final_latents
            t = line_times(args.matching_samples, args.timestep_shift, generator)
            noise = torch.randn(len(t), *image.shape, generator=generator).to(image.device)
            states.append(
                replace(
                    record,
                    latents=line_state(image, noise, t),
                    next_latents=noise,
                    velocities=noise - image,
                    timesteps=t,
                    next_timesteps=torch.ones_like(t),
                )
            )
        return states

    def regularizer(self, velocity: Tensor, reference: Tensor, states: States) -> Tensor:
        return velocity_mse(velocity, reference, num_batch_dims=2).mean()


class FPO(Matching):
    """One clipped ratio per image, of the matching losses averaged over its lines (FPO, arXiv 2507.21053)."""

    pools_steps = True

    def loss(self, velocity: Tensor, old: Tensor, states: States, advantages: Tensor) -> Loss:
        ratio = matching_log_ratio(velocity, old, states.velocities, num_batch_dims=2).mean(1, keepdim=True)
        return clipped(ratio, advantages, self.epsilon)


class AWM(Matching):
    """One clipped ratio per line (advantage-weighted matching, arXiv 2509.25050)."""

    def loss(self, velocity: Tensor, old: Tensor, states: States, advantages: Tensor) -> Loss:
        ratio = matching_log_ratio(velocity, old, states.velocities, num_batch_dims=2)
        return clipped(ratio, advantages, self.epsilon)


class NFT(Matching):
    """Matching towards images of high reward and away from those of low (DiffusionNFT, arXiv 2509.16117)."""

    def loss(self, velocity: Tensor, old: Tensor, states: States, advantages: Tensor) -> Loss:
        times = states.timesteps.to(velocity.device)
        args = (velocity, old, states.latents, states.velocities, times, advantages)
        loss = nft_loss(*args, beta=self.args.nft_beta).mean()
        return loss, {"flow/loss": loss}


OBJECTIVES: dict[str, type[FlowGRPO]] = {"flow_grpo": FlowGRPO, "fpo": FPO, "awm": AWM, "nft": NFT}
"""By `image_objective`."""


def clipped(ratio: Tensor, advantages: Tensor, epsilon: float) -> Loss:
    """PPO's objective of log-ratios (B, K'), with what tells how far the policy has moved."""
    loss = clipped_surrogate(ratio, advantages, epsilon).mean()
    return loss, {
        "flow/loss": loss,
        "flow/ratio_mean": ratio.exp().mean(),
        "flow/log_ratio_std": ratio.std(correction=0),
        "flow/clip_frac": (torch.expm1(ratio).abs() > epsilon).float().mean(),
    }
