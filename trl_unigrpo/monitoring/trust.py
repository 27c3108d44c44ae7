"""Start-up checks of what has ruined runs elsewhere: each looks at the first generation and says what to do."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..flow import Transition
from ..rollout import FlowRecord


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
        """Trained weights in float32."""
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        if self._first("weights") and dtypes & {torch.bfloat16, torch.float16}:
            self._report(
                f"weights to train are stored in {', '.join(sorted(map(str, dtypes)))}, where small updates round to "
                "nothing. Load the model in torch.float32 (bf16=True computes in bfloat16 all the same) or train "
                "adapters."
            )

    def records(self, records: Sequence[FlowRecord], group_size: int, one_window: bool) -> None:
        """States in float32, noise of its own for each sample of a group, and one window if there should be one."""
        if self._first("records"):
            self._report(_dtype_problem(records) or _noise_problem(records, group_size))
            if one_window and any(not torch.equal(r.timesteps, records[0].timesteps) for r in records):
                self._report(
                    "images of one generation have different SDE windows. Rewards would compare unequal noise."
                )

    def windows(self, starts: Tensor) -> None:
        """`starts` (P, K): the window of each process, which must be one."""
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
        The training forward must see what the sampler saw.

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
        """A regulariser under no_grad would be a number in the logs and nothing else."""
        if self._first("regularizer") and not loss.requires_grad:
            self._report("the regulariser has no gradient. Is the image expert trainable?")


def _dtype_problem(records: Sequence[FlowRecord]) -> str | None:
    states = torch.stack([torch.stack([r.latents.float(), r.next_latents.float()]) for r in records])
    for low in (torch.bfloat16, torch.float16):
        stored_low = any(x.dtype == low for r in records for x in (r.latents, r.next_latents))
        if stored_low or torch.equal(states, states.to(low).float()):
            return f"states have the precision of {low}, expected torch.float32: rounding would bias every ratio."
    return None


def _noise_problem(records: Sequence[FlowRecord], group_size: int) -> str | None:
    for start in range(0, len(records), group_size):
        group = torch.stack([r.next_latents.flatten() for r in records[start : start + group_size]])
        if len(torch.unique(group, dim=0)) < len(group):
            return "samples of one group share their noise: their rewards can't differ. Seed each sample on its own."
    return None
