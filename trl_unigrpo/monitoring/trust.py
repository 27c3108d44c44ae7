"""Start-up checks of what has ruined runs elsewhere: each looks at the first generation and says what to do."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..flow import Transition
from ..flow.objectives import States
from ..flow.sampler import FlowRecord
from ..flow.transition import expand_left


class TrustError(RuntimeError):
    """A start-up check failed."""


class TrustChecks:
    """
    The checks of one run; each runs once.

    Args:
        mode: "raise", "warn" or "off".
    """

    def __init__(self, mode: str):
        self.mode = mode
        self._done: set[str] = set()

    def _first(self, name: str) -> bool:
        first = self.mode != "off" and name not in self._done
        self._done.add(name)
        return first

    def _report(self, problem: str | None) -> None:
        if problem is None:
            return
        message = f"Start-up check failed: {problem} (trust_checks='warn' goes on regardless.)"
        if self.mode == "raise":
            raise TrustError(message)
        warnings.warn(message, stacklevel=3)

    def weights(self, model: nn.Module) -> None:
        """Check that trained weights are in float32."""
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        if self._first("weights") and dtypes & {torch.bfloat16, torch.float16}:
            self._report(
                f"weights to train are stored in {', '.join(sorted(map(str, dtypes)))}, where small updates round to "
                "nothing. Load the model in torch.float32 (bf16=True computes in bfloat16 all the same) or train "
                "adapters."
            )

    def records(
        self,
        records: Sequence[FlowRecord],
        group_size: int,
        one_window: bool,
        transition: Callable[[States], Transition] | None = None,
    ) -> None:
        """
        Check that states are in float32; and, in every generation, that there is one window if there should be one,
        and noise of its own for each sample of a group, as strong as the update takes it to be.

        Args:
            transition: of the update, where steps are noisy.
        """
        if self._first("records"):
            self._report(_dtype_problem(records))
        if self.mode != "off" and transition is not None:
            self._report(_noise_problem(_noise(records, transition), group_size))
        if self.mode != "off" and one_window:
            if any(not torch.equal(r.timesteps, records[0].timesteps) for r in records):
                self._report(
                    "images of one generation have different SDE windows. Rewards would compare unequal noise."
                )

    def sampling(self, config: Any, temperature: float) -> None:
        """
        Check that thinkings are sampled as their log-probs are computed.

        Args:
            config: the sampler's, transformers' `GenerationConfig`.
            temperature: that logits are divided by in training.
        """
        if self._first("sampling") and not (config.do_sample and math.isclose(config.temperature, temperature)):
            sampled = f"at temperature {config.temperature}" if config.do_sample else "greedily"
            self._report(
                f"thinkings are sampled {sampled}, but trained on at temperature {temperature}: every ratio would be "
                "biased. Set `temperature` in the configuration, and nowhere else."
            )

    def windows(self, starts: Tensor) -> None:
        """Check that all processes have one window; `starts` (P, K) are those of each."""
        if self._first("windows") and (starts != starts[0]).any():
            self._report(f"processes drew different SDE windows: {starts.tolist()}. Give all of them the same seed.")

    def velocities(
        self,
        trained: Tensor,
        sampled: Tensor,
        coefficients: Transition,
        epsilon: float,
        low_precision: bool,
    ) -> None:
        """
        Check that the training forward sees what the sampler saw.

        Args:
            trained, sampled: (B, K, *latent) velocities of both, at the same weights and states.
            coefficients: of the (B, K) steps.
            epsilon: the clip range that the difference, as a log-ratio, is held against.
        """
        if not self._first("velocities"):
            return
        numbers = math.prod(trained.shape[2:])
        rms = (trained - sampled).flatten(2).double().pow(2).mean(2).sqrt()
        share = float((coefficients.b.abs().to(rms) * rms / math.sqrt(numbers)).max()) / epsilon
        limit = 0.15 if low_precision else 0.01
        if share > limit:
            self._report(
                f"velocities of the rollout and of the training forward differ by {share:.1%} of the clip range "
                f"(limit {limit:.0%}). The model must compute both in the same way: check dropout, padding and the "
                "positions of images."
            )

    def regularizer(self, loss: Tensor) -> None:
        """
        Check that the regulariser has a gradient: under no_grad it would be a number in the logs and nothing else.
        """
        if self._first("regularizer") and not loss.requires_grad:
            self._report("the regulariser has no gradient. Is the image expert trainable?")


def _dtype_problem(records: Sequence[FlowRecord]) -> str | None:
    states = torch.stack([torch.stack([r.latents.float(), r.next_latents.float()]) for r in records])
    for low in (torch.bfloat16, torch.float16):
        stored_low = any(x.dtype == low for r in records for x in (r.latents, r.next_latents))
        if stored_low or torch.equal(states, states.to(low).float()):
            return f"states have the precision of {low}, expected torch.float32: rounding would bias every ratio."
    return None


def _noise(records: Sequence[FlowRecord], transition: Callable[[States], Transition]) -> Tensor:
    """
    Compute the noise (N, K, n) of the recorded steps, of at most 8192 numbers each: eps = (x_next - a x - b v) / std.
    """

    def some(name: str) -> Tensor:
        return torch.stack([getattr(record, name).flatten(1)[:, :8192] for record in records]).double().cpu()

    times = (torch.stack([getattr(r, name) for r in records]).cpu() for name in ("timesteps", "next_timesteps"))
    states = States(some("latents"), some("next_latents"), some("velocities"), *times)
    a, b, std = (expand_left(x, states.latents) for x in transition(states))
    return (states.next_latents - a * states.latents - b * states.velocities) / std


def _noise_problem(noise: Tensor, group_size: int) -> str | None:
    for group in noise.flatten(1).split(group_size):
        distances = torch.cdist(group, group).square() / group.shape[1]  # 2 for independent noise
        if (distances + 2 * torch.eye(len(group)) < 0.01).any():
            return "samples of one group share their noise: their rewards can't differ. Seed each sample on its own."
    power = float(noise.square().mean())
    if abs(power - 1) > 6 * math.sqrt(2 / noise.numel()) + 0.001:
        return (
            f"the noise of the recorded states has {power:.3g} times the power that the update takes it to have: that "
            "biases every ratio. Sampler and update must have the same num_inference_steps, schedule, sde_type and "
            "noise_level."
        )
    return None
