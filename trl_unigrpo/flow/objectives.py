"""Objectives of the image expert, trained on the noisy steps of its own sampling (FlowGRPO), or on straight lines to
the images that it painted (FPO, AWM, DiffusionNFT).

Every objective gives one loss per state; how these are averaged is the business of the table that they come from.

Shapes: S states, `latent` the model's own latent dimensions.
"""

from math import prod
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from .matching import line_state, line_times, matching_log_ratio, nft_loss
from .per_round import of_round, rounds_that_differ
from .ratio import clipped_surrogate, latent_kl, log_ratio, velocity_mse
from .scaling import scale_with_latents, scale_with_steps
from .schedule import flow_timesteps
from .states import LinePoints, SDESteps
from .transition import Transition, transition


Loss = tuple[Tensor, dict[str, Tensor]]
"""Losses (S,) to be minimised, and metrics by name."""


class Objective(Protocol):
    """
    How the image expert is trained.

    Attributes:
        stochastic: images are sampled with noisy steps, which are then the states.
        pools_steps: the loss of one state needs the velocities of all states of its image.
    """

    stochastic: bool
    pools_steps: bool

    def clip_range(self, latents: Tensor) -> float:
        """Give the clip range of images with as many numbers as these latents (S, *latent)."""

    def states(self, image: Tensor, steps: SDESteps, generator: torch.Generator) -> Any:
        """Make the states to train on, of a finished image (*latent) and the noisy steps of its sampling."""

    def loss(
        self, velocity: Tensor, old: Tensor, states: Any, advantages: Tensor, image: Tensor, rounds: Tensor
    ) -> Loss:
        """
        Compute the loss of each state.

        Args:
            velocity: (S, *latent), carries the gradient.
            old: same shape, of the policy that sampled the images.
            states: S states where both were predicted.
            advantages: (S,) of the trajectories that the states belong to.
            image: (S,) numbers of the images that they belong to.
            rounds: (S,) numbers of the rounds that they belong to, on the CPU.
        """

    def regularizer(self, velocity: Tensor, reference: Tensor, states: Any, rounds: Tensor) -> Tensor:
        """Measure the distances (S,) to the reference model, means over the latent's numbers."""


class Clipped:
    """
    Base of the objectives.

    Args:
        args: the configuration.
        epsilon: clip range of this run, see `constants`.
    """

    def __init__(self, args: Any, epsilon: float):
        self.args, self.epsilon = args, epsilon

    def clip_range(self, latents: Tensor) -> float:
        return of_size(self.args, self.epsilon, latents)


class FlowGRPO(Clipped):
    """The clipped ratio of the recorded SDE steps, RatioNorm'ed (arXiv 2603.23500, eq. 5)."""

    stochastic = True
    pools_steps = False

    def __init__(self, args: Any, epsilon: float):
        super().__init__(args, epsilon)
        self.first_nodes = [
            flow_timesteps(of_round(args, "num_inference_steps", number), args.timestep_shift)[1]
            for number in range(rounds_that_differ(args))
        ]

    def states(self, image: Tensor, steps: SDESteps, generator: torch.Generator) -> SDESteps:
        return steps

    def transition(self, states: SDESteps, rounds: Tensor | int = 0) -> Transition:
        """Describe the recorded steps as Gaussians, by the settings of their rounds (S,), or of one for all."""
        settings = torch.as_tensor(rounds).clamp(max=len(self.first_nodes) - 1).expand(len(states))
        parts = torch.empty(3, len(states), dtype=torch.float64)
        for number in settings.unique().tolist():
            here, noise_level = settings == number, of_round(self.args, "noise_level", number)
            times = states.t[here], states.t_next[here]
            parts[:, here] = torch.stack(transition(self.args.sde_type, *times, noise_level, self.first_nodes[number]))
        return Transition(*parts)

    def loss(
        self, velocity: Tensor, old: Tensor, states: SDESteps, advantages: Tensor, image: Tensor, rounds: Tensor
    ) -> Loss:
        tr = self.transition(states, rounds)
        ratio = log_ratio(states.x, states.x_next, velocity, old, tr, self.args.ratio_norm)
        return clipped(ratio, advantages, self.clip_range(velocity))

    def regularizer(self, velocity: Tensor, reference: Tensor, states: SDESteps, rounds: Tensor) -> Tensor:
        kind = self.args.flow_regularizer
        if kind == "velocity_mse":
            return velocity_mse(velocity, reference, num_batch_dims=1)
        form, dt = "exact" if kind == "latent_kl" else "flow_grpo", states.t_next - states.t
        return latent_kl(velocity, reference, self.transition(states, rounds), num_batch_dims=1, form=form, dt=dt)


class Matching(Clipped):
    """
    Objectives of points on straight lines from noise to the finished image, `matching_samples` of them per image;
    images are sampled by the ODE.
    """

    stochastic = False
    pools_steps = False

    def states(self, image: Tensor, steps: SDESteps, generator: torch.Generator) -> LinePoints:
        t = line_times(self.args.matching_samples, self.args.timestep_shift, generator)
        noise = torch.randn(len(t), *image.shape, generator=generator).to(image.device)
        return LinePoints(x=line_state(image, noise, t), t=t, target=noise - image)

    def log_ratio(self, velocity: Tensor, old: Tensor, states: LinePoints) -> Tensor:
        """Compare with the old policy how well velocities match their lines, (S,)."""
        return matching_log_ratio(velocity, old, states.target, num_batch_dims=1, centred=self.args.ratio_norm)

    def regularizer(self, velocity: Tensor, reference: Tensor, states: LinePoints, rounds: Tensor) -> Tensor:
        return velocity_mse(velocity, reference, num_batch_dims=1)


class FPO(Matching):
    """One clipped ratio per image, of the matching losses averaged over its lines (FPO, arXiv 2507.21053)."""

    pools_steps = True

    def loss(
        self, velocity: Tensor, old: Tensor, states: LinePoints, advantages: Tensor, image: Tensor, rounds: Tensor
    ) -> Loss:
        ratio = self.log_ratio(velocity, old, states)
        return clipped(mean_by(image, ratio), advantages, self.clip_range(velocity))


class AWM(Matching):
    """One clipped ratio per line (advantage-weighted matching, arXiv 2509.25050)."""

    def loss(
        self, velocity: Tensor, old: Tensor, states: LinePoints, advantages: Tensor, image: Tensor, rounds: Tensor
    ) -> Loss:
        ratio = self.log_ratio(velocity, old, states)
        return clipped(ratio, advantages, self.clip_range(velocity))


class NFT(Matching):
    """Matching towards images of high reward and away from those of low (DiffusionNFT, arXiv 2509.16117)."""

    def loss(
        self, velocity: Tensor, old: Tensor, states: LinePoints, advantages: Tensor, image: Tensor, rounds: Tensor
    ) -> Loss:
        times = states.t.to(velocity.device)
        return nft_loss(velocity, old, states.x, states.target, times, advantages, beta=self.args.nft_beta), {}


OBJECTIVES: dict[str, Any] = {"flow_grpo": FlowGRPO, "fpo": FPO, "awm": AWM, "nft": NFT}
"""By `image_objective`."""


def constants(args: Any) -> tuple[float, float]:
    """
    Give the clip range and the regulariser weight of a run, 0 without regulariser, at 262144 numbers per image.

    With `scale_with_latents` both are carried to FlowGRPO's noisy steps here, and to the size of images by `of_size`,
    so that they mean the same change of velocity as the configuration's values do in the paper's run; where rounds
    have noisy steps of their own, on average over the rounds.
    """
    epsilon = args.flow_epsilon or 0.0  # never None: the configuration chooses
    weight = 0.0 if args.flow_regularizer == "none" else args.flow_regularizer_weight
    noisy = args.image_objective == "flow_grpo" and args.flow_weight > 0
    if not (args.scale_with_latents and noisy):
        return epsilon, weight
    scale = fmean(_scale_of_round(args, number) for number in range(rounds_that_differ(args)))
    return scale * epsilon, scale * weight


def of_size(args: Any, constant: float, latents: Tensor) -> float:
    """Carry one of the `constants` to images of another size, that of latents (S, *latent)."""
    return scale_with_latents(constant, prod(latents.shape[1:])) if args.scale_with_latents else constant


def _scale_of_round(args: Any, number: int) -> float:
    """Compare the length of a round's noisy steps with that of the paper's."""
    return scale_with_steps(
        1.0,
        of_round(args, "num_inference_steps", number),
        args.timestep_shift,
        args.sde_type,
        of_round(args, "noise_level", number),
        of_round(args, "sde_window_range", number),
        of_round(args, "sde_window_size", number),
        args.sde_window_mode,
        args.ratio_norm,
    )


def clipped(ratio: Tensor, advantages: Tensor, epsilon: float) -> Loss:
    """Compute PPO's objective of log-ratios (S,), with what tells how far the policy has moved."""
    moved = torch.expm1(ratio)
    return clipped_surrogate(ratio, advantages, epsilon), {
        "flow/ratio_mean": ratio.exp().mean(),
        "flow/log_ratio_std": ratio.std(correction=0),
        "flow/clip_frac": (moved.abs() > epsilon).float().mean(),
        "flow/no_gradient_frac": (moved * advantages.sign() > epsilon).float().mean(),
    }


def mean_by(image: Tensor, values: Tensor) -> Tensor:
    """Give each state the mean of its image's values; (S,) of values (S,)."""
    group = image.unique(return_inverse=True)[1].to(values.device)
    sums = values.new_zeros(int(group.max()) + 1).index_add(0, group, values)
    counts = values.new_zeros(len(sums)).index_add(0, group, torch.ones_like(values))
    return (sums / counts)[group]
