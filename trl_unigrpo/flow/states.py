"""The states at which a velocity is trained: noisy steps of a sampler, or points on lines from noise to an image.

Shapes: S states, `latent` the model's own latent dimensions. States are float32: in bfloat16 the update would see
rounding, not noise. Times stay on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass
class States:
    """
    Attributes:
        x: (S, *latent) the states.
        t: (S,) their times in [0, 1].
    """

    x: Tensor
    t: Tensor

    def __len__(self) -> int:
        return len(self.t)


@dataclass
class SDESteps(States):
    """
    Noisy steps of a sampler, each a Gaussian from `x` at `t` to `x_next` at `t_next`.

    Attributes:
        x_next: (S, *latent) the states that follow.
        t_next: (S,) their times.
        velocity: (S, *latent) the one that the sampler went on with, guided where it was.
    """

    x_next: Tensor
    t_next: Tensor
    velocity: Tensor


@dataclass
class LinePoints(States):
    """
    Points x = (1 - t) image + t noise of straight lines.

    Attributes:
        target: (S, *latent) the lines' velocities, noise - image.
    """

    target: Tensor


AnyStates = TypeVar("AnyStates", bound=States)


def columns(states: States) -> dict[str, Tensor]:
    """Name the tensors of a table of states."""
    return {field.name: getattr(states, field.name) for field in fields(states)}


def rows_of(states: AnyStates, index: Any) -> AnyStates:
    """Take some of the states: by a slice, or a tensor (S',) of their numbers. Times are on the CPU."""
    there, numbers = (index.to(states.x.device), index.cpu()) if isinstance(index, Tensor) else (index, index)
    taken = {name: column[there if column.ndim > 1 else numbers] for name, column in columns(states).items()}
    return type(states)(**taken)


def join(tables: Sequence[AnyStates]) -> AnyStates:
    """Join tables to one; raises ValueError where they are of different kinds."""
    kinds = {type(table) for table in tables}
    if len(kinds) > 1:
        raise ValueError(f"Images of one batch have states of different kinds: {sorted(k.__name__ for k in kinds)}.")
    (kind,) = kinds
    return kind(**{field.name: torch.cat([getattr(table, field.name) for table in tables]) for field in fields(kind)})


def without_nan(states: AnyStates) -> AnyStates:
    """Put zeros where the states are not finite numbers, which no weight of 0 would take from a loss."""
    return type(states)(**{name: x.where(x.isfinite(), torch.zeros_like(x)) for name, x in columns(states).items()})


def on_device(states: AnyStates, device: torch.device | str) -> AnyStates:
    """Bring the states to a device, their times to the CPU."""
    moved = {name: x.to(device) if x.ndim > 1 else x.cpu() for name, x in columns(states).items()}
    return type(states)(**moved)
