"""Classifier-free guidance in BAGEL's form. UniGRPO trains without it; evaluation, or an ablation, may use it.

Shapes: B samples, `latent` the model's own latent dimensions, of which the last is the numbers of one token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .transition import expand_left


Velocity = Callable[[Tensor, Tensor], Tensor]
"""Predicts the velocity (B, *latent) at states (B, *latent) and times (B,)."""

RENORMS = ("global", "channel", "text_channel")


@dataclass(frozen=True)
class Guidance:
    """
    How far an image is pushed towards its prompt and its thinking.

    A scale of 1 is off: its branch is not computed. Each scale above 1 costs one more forward at every denoising step
    inside of the interval.

    Attributes:
        guidance_scale: s_text, away from the image without the prompt. BAGEL's own evaluation: 4.
        image_guidance_scale: s_img, away from the image without the thinking.
        interval: times (low, high] at which to guide, of the shifted schedule: 1 is noise, 0 the image.
        renorm: what the guided velocity is shrunk back by, so that it is not longer than the unguided one: the length
            of each sample's whole velocity ("global"), of each token ("channel"), or of each token before the image
            branch ("text_channel").
        renorm_min: least factor of that, in [0, 1]; 1 leaves lengths as they are.

    Raises:
        ValueError: for a scale below 1, an interval that is empty or leaves [0, 1], another `renorm`, or a
            `renorm_min` outside of [0, 1].

    Example:

    ```python
    samples = generate(model, prompts, guidance=Guidance(guidance_scale=4.0))
    ```
    """

    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "image_guidance_scale"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 (off) or more.")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(
                f"interval={self.interval}: expected times (low, high) with 0 <= low < high <= 1, where 1 is noise. "
                "To switch guidance off, set the scales to 1."
            )
        if self.renorm not in RENORMS:
            raise ValueError(
                f"renorm={self.renorm!r}: expected one of {', '.join(map(repr, RENORMS))}; renorm_min=1 turns it off."
            )
        if not 0 <= self.renorm_min <= 1:
            raise ValueError(
                f"renorm_min={self.renorm_min}: expected a number from 0 to 1 (lengths stay as they are)."
            )

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches to compute: "text" (without the prompt), "image" (without the thinking), both or none."""
        scales = {"text": self.guidance_scale, "image": self.image_guidance_scale}
        return tuple(name for name, scale in scales.items() if scale > 1)

    def covers(self, t: float | Tensor) -> bool:
        """Whether time t is guided: low < t <= high, all in float32, as a rollout records its times."""
        low, high, time = torch.tensor([*self.interval, float(t)], dtype=torch.float32).tolist()
        return low < time <= high


def guide(velocity: Tensor, branches: Mapping[str, Tensor], guidance: Guidance) -> Tensor:
    """
    The guided velocity, (B, *latent):

        v_text = v_u + s_text (v - v_u)               v_u: of the branch "text"
        v'     = v_img + s_img (v_text - v_img)       v_img: of the branch "image"

    shrunk by clamp(|v| / (|v'| + 1e-8), renorm_min, 1); with "text_channel" v_text is, before the second line. A line
    whose branch is off is left out.

    Args:
        velocity: (B, *latent) v, of the whole context.
        branches: (B, *latent) each, of exactly `guidance.branches`.

    Raises:
        ValueError: for other branches than those: without one the image would silently be another.
    """
    if set(branches) != set(guidance.branches):
        raise ValueError(
            f"Guidance got velocities of the branches {sorted(branches)}, expected {sorted(guidance.branches)}: "
            "encode the contexts of `Guidance.branches`, no more and no fewer."
        )
    guided = velocity
    if "text" in branches:
        guided = branches["text"] + guidance.guidance_scale * (velocity - branches["text"])
        if guidance.renorm == "text_channel":
            guided = shrink(guided, velocity, (-1,), guidance.renorm_min)
    if "image" in branches:
        guided = branches["image"] + guidance.image_guidance_scale * (guided - branches["image"])
    if branches and guidance.renorm != "text_channel":
        dims = tuple(range(1, velocity.ndim)) if guidance.renorm == "global" else (-1,)
        guided = shrink(guided, velocity, dims, guidance.renorm_min)
    return guided


def guide_where_covered(velocity: Tensor, branches: Mapping[str, Tensor], times: Tensor, guidance: Guidance) -> Tensor:
    """[`guide`] for the rows (B, *latent) whose time, of `times` (B,), is guided; the others stay as they are."""
    covered = torch.tensor([guidance.covers(t) for t in times.tolist()], device=velocity.device)
    return torch.where(expand_left(covered, velocity).bool(), guide(velocity, branches, guidance), velocity)


def guided_velocity(velocity: Velocity, branches: Mapping[str, Velocity], guidance: Guidance | None) -> Velocity:
    """
    The guided velocity of a sampler whose rows have one time: branches are computed where that time is guided.

    Args:
        velocity: of the whole context.
        branches: of the contexts that `guidance.branches` names.
    """
    if guidance is None or not guidance.branches:
        return velocity

    def guided(latents: Tensor, times: Tensor) -> Tensor:
        predicted = velocity(latents, times).float()
        if not guidance.covers(times[0]):
            return predicted
        return guide(predicted, {name: branch(latents, times).float() for name, branch in branches.items()}, guidance)

    return guided


def shrink(guided: Tensor, velocity: Tensor, dims: tuple[int, ...], renorm_min: float) -> Tensor:
    """`guided` times clamp(|velocity| / (|guided| + 1e-8), renorm_min, 1), lengths taken over `dims`."""
    target, length = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (velocity, guided))
    return guided * (target / (length + 1e-8)).clamp(renorm_min, 1.0)
