"""The image rollout: a hybrid ODE/SDE sampler of the flow that records the SDE steps for training.

Shapes: B samples, N denoising steps, K of them stochastic, `latent` the model's own latent dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .flow import ode_transition, step, transition


@dataclass(frozen=True)
class RolloutPlan:
    """
    How the images of a batch are sampled.

    Attributes:
        timesteps: (N + 1,) nodes from 1 (noise) to 0 (image).
        image_size: (height, width) in pixels.
        windows: (K,) indices of the stochastic steps, for all samples, or (B, K), one row per sample, sorted; none for
            a pure ODE.
        sde_type: "sde" (Flow-SDE) or "cps".
        noise_level: a, the strength of the noise.
        batch_size: images denoised at once; None for all.
    """

    timesteps: Tensor
    image_size: tuple[int, int]
    windows: Tensor | None = None
    sde_type: str = "sde"
    noise_level: float = 0.8
    batch_size: int | None = None

    def rows(self, chunk: slice) -> "RolloutPlan":
        """The plan of some of the samples."""
        return (
            self
            if self.windows is None or self.windows.ndim == 1
            else replace(self, windows=self.windows[chunk])
        )


@dataclass
class FlowRecord:
    """
    What one image's sampling leaves behind. All states are float32: in bfloat16 the update would see rounding, not noise.

    Attributes:
        final_latents: (*latent) the finished image.
        context: what the model needs to see again; its own business.
        image_size: (height, width) in pixels.
        latents, next_latents: (K, *latent) states before and after each stochastic step.
        timesteps, next_timesteps: (K,) their times.
        velocities: (K, *latent) what the sampler's forward predicted there.
    """

    final_latents: Tensor
    context: Any
    image_size: tuple[int, int]
    latents: Tensor
    next_latents: Tensor
    timesteps: Tensor
    next_timesteps: Tensor
    velocities: Tensor


@torch.no_grad()
def sample_latents(
    velocity: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    plan: RolloutPlan,
    generators: Sequence[torch.Generator],
    contexts: Sequence[Any],
    device: torch.device | str = "cpu",
) -> list[FlowRecord]:
    """
    Integrate dx = v dt from noise at t = 1 to the image at t = 0: Euler steps outside the window, stochastic steps inside.

    Args:
        velocity: predicts the velocity (B, *latent) at states (B, *latent) and times (B,).
        shape: latent shape of one image.
        plan: steps, windows and noise.
        generators: one per sample, on the CPU; draws the first noise, then one noise per stochastic step.
        contexts: one per sample, handed through to the records.
        device: where the states live.
    """
    batch_size, nodes = len(generators), plan.timesteps.double().cpu()
    windows = torch.empty(0, dtype=torch.long) if plan.windows is None else plan.windows
    stochastic = torch.zeros(batch_size, len(nodes) - 1, dtype=torch.bool)
    stochastic.scatter_(1, windows.expand(batch_size, -1), True)

    def noise(rows: Tensor) -> Tensor:
        drawn = torch.zeros(batch_size, *shape)
        for row in rows.nonzero().flatten().tolist():
            drawn[row] = torch.randn(shape, generator=generators[row])
        return drawn.to(device)

    latents = noise(torch.ones(batch_size, dtype=torch.bool))
    recorded = []
    for i, (t, t_next) in enumerate(zip(nodes[:-1], nodes[1:], strict=True)):
        times = t.float().to(device).expand(batch_size)
        predicted = velocity(latents, times).float()
        now = stochastic[:, i]
        if now.any():
            noisy = transition(plan.sde_type, t, t_next, plan.noise_level, nodes[1])
            plain = ode_transition(t, t_next)
            coefficients = type(noisy)(
                *(
                    torch.where(now, a, b).to(device)
                    for a, b in zip(noisy, plain, strict=True)
                )
            )
            following, _ = step(latents, predicted, coefficients, noise(now))
            recorded.append((i, latents, following, predicted))
        else:
            following, _ = step(
                latents, predicted, ode_transition(t.to(device), t_next.to(device))
            )
        latents = following

    records = []
    for row in range(batch_size):
        steps = [entry for entry in recorded if stochastic[row, entry[0]]]
        index = torch.tensor([entry[0] for entry in steps], dtype=torch.long)
        before, after, predicted = (
            torch.stack([entry[j][row] for entry in steps])
            if steps
            else torch.zeros(0, *shape, device=device)
            for j in (1, 2, 3)
        )
        records.append(
            FlowRecord(
                final_latents=latents[row],
                context=contexts[row],
                image_size=plan.image_size,
                latents=before,
                next_latents=after,
                timesteps=nodes[index].float(),
                next_timesteps=nodes[index + 1].float(),
                velocities=predicted,
            )
        )
    return records
