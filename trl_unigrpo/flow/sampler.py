"""The image rollout: a hybrid ODE/SDE sampler of the flow that records the SDE steps for training.

Shapes: B samples, N denoising steps, K of them stochastic, `latent` the model's own latent dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import (
    Transition,
    ode_transition,
    step,
    transition,
)
from .guidance import Guidance, guide


Velocity = Callable[[Tensor, Tensor], Tensor]
"""Predicts the velocity (B, *latent) at states (B, *latent) and times (B,)."""


@dataclass(frozen=True)
class RolloutPlan:
    """
    How the images of a batch are sampled.

    Attributes:
        timesteps: (N + 1,) nodes from 1 (noise) to 0 (image), or to an earlier time, whose state is wanted.
        image_size: (height, width) in pixels.
        windows: (K,) indices of the stochastic steps, for all samples, or (B, K), one row per sample, sorted; none for
            a pure ODE.
        sde_type: "sde" (Flow-SDE) or "cps".
        noise_level: a, the strength of the noise.
        batch_size: images denoised at once; None for all.
        guidance: classifier-free guidance; None for none.
    """

    timesteps: Tensor
    image_size: tuple[int, int]
    windows: Tensor | None = None
    sde_type: str = "sde"
    noise_level: float = 0.8
    batch_size: int | None = None
    guidance: Guidance | None = None

    def rows(self, chunk: slice) -> "RolloutPlan":
        """The plan of some of the samples."""
        return self if self.windows is None or self.windows.ndim == 1 else replace(self, windows=self.windows[chunk])


@dataclass
class FlowRecord:
    """
    What one image's sampling leaves behind. All states are float32: in bfloat16 the update would see rounding, not
    noise.

    Attributes:
        final_latents: (*latent) the finished image.
        context: what the model needs to see again; its own business.
        image_size: (height, width) in pixels.
        latents, next_latents: (K, *latent) states before and after each stochastic step.
        timesteps, next_timesteps: (K,) their times.
        velocities: (K, *latent) what the sampler went on with there, guided where it was.
        guidance: the sampler's, which training repeats.
        branches: what the model needs to see for each branch of it, by name.
    """

    final_latents: Tensor
    context: Any
    image_size: tuple[int, int]
    latents: Tensor
    next_latents: Tensor
    timesteps: Tensor
    next_timesteps: Tensor
    velocities: Tensor
    guidance: Guidance | None = None
    branches: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def sample_latents(
    velocity: Velocity,
    shape: tuple[int, ...],
    plan: RolloutPlan,
    generators: Sequence[torch.Generator],
    contexts: Sequence[Any],
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    branches: Mapping[str, Velocity] | None = None,
    branch_contexts: Mapping[str, Sequence[Any]] | None = None,
) -> list[FlowRecord]:
    """
    Integrate dx = v dt from noise at t = 1 to the image at t = 0: Euler steps outside the window, stochastic ones
    inside.

    Args:
        velocity: of the whole context.
        shape: latent shape of one image.
        plan: steps, windows, noise and guidance.
        generators: one per sample, on the CPU; draws the first noise, then one noise per stochastic step.
        contexts: one per sample, handed through to the records.
        device: where the states live.
        start: (B, *latent) the first noise, where the model draws it.
        branches: velocities of the contexts that `plan.guidance.branches` names.
        branch_contexts: these contexts, one per sample, handed through to the records.
    """
    batch_size, nodes = len(generators), plan.timesteps.double().cpu()
    stochastic = stochastic_steps(plan.windows, batch_size, len(nodes) - 1)

    def noise(rows: list[int]) -> Tensor:
        drawn = torch.zeros(batch_size, *shape)
        for row in rows:
            drawn[row] = torch.randn(shape, generator=generators[row])
        return drawn.to(device)

    latents = noise(list(range(batch_size))) if start is None else start.to(device)
    indices: list[list[int]] = [[] for _ in range(batch_size)]
    recorded: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(batch_size)]
    for i in range(len(nodes) - 1):
        t, t_next = nodes[i], nodes[i + 1]
        times = t.float().to(device).expand(batch_size)
        predicted = velocity(latents, times).float()
        if plan.guidance is not None and plan.guidance.covers(t):
            unguided = {name: branch(latents, times).float() for name, branch in (branches or {}).items()}
            predicted = guide(predicted, unguided, plan.guidance)
        coefficients, rows = ode_transition(t, t_next), stochastic[:, i].nonzero().flatten().tolist()
        if rows:
            noisy = transition(plan.sde_type, t, t_next, plan.noise_level, nodes[1])
            mixed = (torch.where(stochastic[:, i], a, b) for a, b in zip(noisy, coefficients, strict=True))
            coefficients = Transition(*mixed)
        following, _ = step(latents, predicted, coefficients, noise(rows) if rows else None)
        for row in rows:
            indices[row].append(i)
            recorded[row].append((latents[row], following[row], predicted[row]))
        latents = following

    records = []
    for row in range(batch_size):
        index = torch.tensor(indices[row], dtype=torch.long)
        states = list(zip(*recorded[row], strict=True)) or [(), (), ()]
        before, after, velocities = (torch.stack(x) if x else latents.new_zeros(0, *shape) for x in states)
        records.append(
            FlowRecord(
                final_latents=latents[row].clone(),  # a view would keep, and save, the whole batch
                context=contexts[row],
                image_size=plan.image_size,
                latents=before,
                next_latents=after,
                timesteps=nodes[index].float(),
                next_timesteps=nodes[index + 1].float(),
                velocities=velocities,
                guidance=plan.guidance,
                branches={name: rows[row] for name, rows in (branch_contexts or {}).items()},
            )
        )
    return records


def stochastic_steps(windows: Tensor | None, batch_size: int, num_steps: int) -> Tensor:
    """(B, N) True where a step of a sample is stochastic."""
    stochastic = torch.zeros(batch_size, num_steps, dtype=torch.bool)
    if windows is None:
        return stochastic
    if windows.ndim == 2 and len(windows) != batch_size:
        raise ValueError(
            f"Got {len(windows)} windows for {batch_size} samples: pass one (K,) for all, or one row each."
        )
    if windows.numel() and not 0 <= int(windows.min()) <= int(windows.max()) < num_steps:
        raise ValueError(
            f"The SDE window {windows.tolist()} reaches beyond the {num_steps} denoising steps, which count from 0. "
            "Narrow `sde_window_range` or raise `num_inference_steps`."
        )
    return stochastic.scatter_(1, windows.cpu().expand(batch_size, -1), True)
