"""Rollouts in a checkpoint, so that a run stopped between two passes over them resumes exactly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..trajectory import from_state, to_state


def save_rollouts(folder: str | Path, process: int, state: dict[str, Any], context_types: Sequence[type] = ()) -> None:
    """
    Write what one process needs to go on inside a generation batch, as plain tensors, numbers and texts.

    Args:
        folder: the checkpoint's.
        process: this process' index.
        state: `step`, micro-steps so far; `geometry`, the numbers that cut a generation batch into micro-batches;
            `buffer`, the micro-batches of a generation batch that has passes left, else None; and `velocities`, of
            the old and the reference policy at their steps.
        context_types: dataclasses that the model's contexts are made of.
    """
    torch.save(to_state(state, context_types), _file(folder, process))


def load_rollouts(folder: str | Path, process: int, context_types: Sequence[type] = ()) -> dict[str, Any] | None:
    """
    Read what [`save_rollouts`] wrote, as data only, to the CPU; None if the checkpoint has no such file.

    Args:
        context_types: dataclasses that the model's contexts are made of.
    """
    file = _file(folder, process)
    if not file.is_file():
        return None
    return from_state(torch.load(file, map_location="cpu", weights_only=True), context_types)


def _file(folder: str | Path, process: int) -> Path:
    return Path(folder) / f"rollouts_{process}.pt"
