"""Rollouts in a checkpoint, so that a run stopped between two passes over them resumes exactly."""

from pathlib import Path
from typing import Any

import torch

from ..flow.guidance import Guidance
from ..flow.sampler import FlowRecord
from ..models.contract import ContextRow


def save_rollouts(folder: str | Path, process: int, state: dict[str, Any]) -> None:
    """
    Write what one process needs to go on inside a generation batch.

    Args:
        folder: the checkpoint's.
        process: this process' index.
        state: `step`, micro-steps so far; `geometry`, the numbers that cut a generation batch into micro-batches; and
            `buffer`, the micro-batches of a generation batch that has passes left, else None.
    """
    torch.save(state, _file(folder, process))


def load_rollouts(folder: str | Path, process: int, device: torch.device) -> dict[str, Any] | None:
    """Read what [`save_rollouts`] wrote, as data only; None if the checkpoint has no such file."""
    file = _file(folder, process)
    if not file.is_file():
        return None
    with torch.serialization.safe_globals([FlowRecord, ContextRow, Guidance]):
        return torch.load(file, map_location=device, weights_only=True)


def _file(folder: str | Path, process: int) -> Path:
    return Path(folder) / f"rollouts_{process}.pt"
