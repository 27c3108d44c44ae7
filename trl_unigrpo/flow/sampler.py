"""The image rollout: a hybrid ODE/SDE sampler of the flow that keeps the SDE steps for training.

Shapes: B images, N denoising steps, K of them stochastic, `latent` the model's own latent dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .guidance import Guidance, Velocity
from .states import SDESteps
from .transition import Transition, ode_transition, step, transition


@dataclass(frozen=True)
class RolloutPlan:
    """
    How the images of a batch are sampled.

    Attributes:
        timesteps: (N + 1,) nodes from 1 (noise) to 0 (image), or to an earlier time, whose state is wanted.
        image_size: (height, width) in pixels.
        windows: (K,) indices of the stochastic steps, for all images, or (B, K), one row per image, sorted; none for
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

    def rows(self, chunk: slice | list[int]) -> "RolloutPlan":
        """Plan some of the images."""
        return self if self.windows is None or self.windows.ndim == 1 else replace(self, windows=self.windows[chunk])


def draw_noise(
    shape: tuple[int, ...], generators: Sequence[torch.Generator], rows: Sequence[int], device: torch.device | str
) -> Tensor:
    """Draw noise (B, *shape), for each of the `rows` by its own generator on the CPU; 0 in the others."""
    noise = torch.zeros(len(generators), *shape)
    for row in rows:
        noise[row] = torch.randn(shape, generator=generators[row])
    return noise.to(device)


@torch.no_grad()
def sample_latents(
    velocity: Velocity, start: Tensor, plan: RolloutPlan, generators: Sequence[torch.Generator]
) -> tuple[Tensor, list[SDESteps]]:
    """
    Integrate dx = v dt from noise at t = 1 to the image at t = 0: Euler steps outside the window, stochastic ones
    inside.

    Args:
        velocity: guided as the plan has it.
        start: (B, *latent) the first noise.
        plan: steps, windows and noise.
        generators: one per image, on the CPU; draws one noise per stochastic step.

    Returns:
        The images (B, *latent), and each one's stochastic steps.
    """
    batch_size, nodes = len(start), plan.timesteps.double().cpu()
    stochastic = stochastic_steps(plan.windows, batch_size, len(nodes) - 1)
    # Moved before the loop: a copy in it would wait for the device at every step.
    times, coefficients = nodes.float().to(start.device), _coefficients(plan, nodes, stochastic).to(start.device)
    latents = start
    walked: list[list[tuple[Tensor, ...]]] = [[] for _ in range(batch_size)]
    for i in range(len(nodes) - 1):
        predicted = velocity(latents, times[i].expand(batch_size)).float()
        rows = stochastic[:, i].nonzero().flatten().tolist()
        noise = draw_noise(start.shape[1:], generators, rows, start.device) if rows else None
        following, _ = step(latents, predicted, Transition(*coefficients[i]), noise)
        t, t_next = nodes[i : i + 2].float()
        for row in rows:
            walked[row].append((latents[row], t, following[row], t_next, predicted[row]))
        latents = following
    return latents, [_table(row, start) for row in walked]


def _coefficients(plan: RolloutPlan, nodes: Tensor, stochastic: Tensor) -> Tensor:
    """Compute a, b and std of every step of every image, (N, 3, B) in float32 as they meet the states."""
    table = []
    for i, noisy in enumerate(stochastic.unbind(1)):
        t, t_next = nodes[i], nodes[i + 1]
        plain = torch.stack(ode_transition(t, t_next))[:, None].expand(-1, len(noisy))
        if noisy.any():
            mixed = torch.stack(transition(plan.sde_type, t, t_next, plan.noise_level, nodes[1]))
            plain = torch.where(noisy, mixed[:, None], plain)
        table.append(plain)
    return torch.stack(table).float()


def _table(walked: list[tuple[Tensor, ...]], start: Tensor) -> SDESteps:
    """Make a table of the stochastic steps of one image."""
    none, no_time = start.new_zeros(0, *start.shape[1:]), torch.zeros(0)
    x, t, x_next, t_next, velocity = (
        (torch.stack(column) for column in zip(*walked, strict=True))
        if walked
        else (none, no_time, none, no_time, none)
    )
    return SDESteps(x=x, t=t, x_next=x_next, t_next=t_next, velocity=velocity)


def stochastic_steps(windows: Tensor | None, batch_size: int, num_steps: int) -> Tensor:
    """Mark the stochastic steps: (B, N), True where a step of an image is one."""
    stochastic = torch.zeros(batch_size, num_steps, dtype=torch.bool)
    if windows is None:
        return stochastic
    if windows.ndim == 2 and len(windows) != batch_size:
        raise ValueError(
            f"Got {len(windows)} windows for {batch_size} images: pass one (K,) for all, or one row each."
        )
    if windows.numel() and not 0 <= int(windows.min()) <= int(windows.max()) < num_steps:
        raise ValueError(
            f"The SDE window {windows.tolist()} reaches beyond the {num_steps} denoising steps, which count from 0. "
            "Narrow `sde_window_range` or raise `num_inference_steps`."
        )
    return stochastic.scatter_(1, windows.cpu().expand(batch_size, -1), True)
