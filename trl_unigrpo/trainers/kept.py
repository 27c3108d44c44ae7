"""Velocities of the old and of the reference policy, kept beside the trajectories of a generation batch."""

from typing import Any

import torch
from torch import Tensor

from ..trajectory import Steps


class KeptVelocities:
    """
    Velocities at the steps of the generation batch in use, on the CPU, by policy ("old", "reference") and by image.

    An image goes by its seed, which no other of the batch has, however rows are shuffled and cut.
    """

    def __init__(self) -> None:
        self._of: dict[str, dict[tuple[int, ...], Tensor]] = {}

    def clear(self) -> None:
        """Forget the generation batch before."""
        self._of = {}

    def keep(self, policy: str, steps: Steps, velocity: Tensor) -> None:
        """Keep the velocities (S, *latent) of a policy at all steps of some images."""
        kept, counts = self._of.setdefault(policy, {}), steps.image.bincount(minlength=len(steps.images)).tolist()
        for image, own in zip(steps.images, velocity.detach().cpu().split(counts), strict=True):
            if image.seed in kept:
                raise ValueError(
                    f"Two images of a generation batch have the seed {image.seed}: give each image one of its own."
                )
            kept[image.seed] = own

    def at(self, policy: str, steps: Steps) -> Tensor | None:
        """Find a policy's velocities (S, *latent) at all steps of some images, on their device; None if not kept."""
        kept = self._of.get(policy, {})
        if any(image.seed not in kept for image in steps.images):
            return None
        return torch.cat([kept[image.seed] for image in steps.images]).to(steps.x.device)

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        return {policy: list(kept.items()) for policy, kept in self._of.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what [`state`] gave."""
        self._of = {policy: dict(kept) for policy, kept in state.items()}
