"""Rollouts in a checkpoint, so that a run stopped between two passes over them resumes exactly."""

from pathlib import Path
from typing import Any

import torch

from .rollout import FlowRecord


def _file(folder: str | Path, process: int) -> Path:
    return Path(folder) / f"rollouts_{process}.pt"


def save_rollouts(folder: str | Path, process: int, step: int, buffer: list[dict[str, Any]] | None) -> None:
    """
    Write the micro-step count of one process and its current generation batch, split as it is trained on.

    Args:
        step: forward and backward passes so far.
        buffer: the micro-batches of a generation that has passes left, else None.
    """
    torch.save({"step": step, "buffer": buffer}, _file(folder, process))


def load_rollouts(folder: str | Path, process: int) -> tuple[int, list[dict[str, Any]] | None] | None:
    """Read what [`save_rollouts`] wrote, as data only; None if the checkpoint has no such file."""
    file = _file(folder, process)
    if not file.is_file():
        return None
    with torch.serialization.safe_globals([FlowRecord]):
        state = torch.load(file, map_location="cpu", weights_only=True)
    return state["step"], state["buffer"]
