"""Checks of the user's data, before anything expensive."""

from collections.abc import Sequence
from typing import Any


IMAGE_COLUMNS = ("image", "images", "generated_images")


def check_dataset(dataset: Any, name: str) -> None:
    """
    Raise ValueError if a dataset of prompts can't be trained on.

    Args:
        dataset: a `datasets` dataset, streamed or not, or a dict of them.
        name: what to call it in the message.
    """
    for part, columns in check_columns(dataset, name, ("prompt",)).items():
        taken = [column for column in IMAGE_COLUMNS if column in columns]
        if taken:
            raise ValueError(
                f"{part} has a column {taken[0]!r}, a name that is taken: reward functions get the painted images as "
                f"`images`. Rename it: dataset.rename_column({taken[0]!r}, 'reference_image')."
            )


def check_columns(dataset: Any, name: str, needed: Sequence[str]) -> dict[str, list[str]]:
    """Raise ValueError if a dataset is empty or lacks a column; returns the columns of each dataset by its name."""
    if isinstance(dataset, dict):
        parts = [check_columns(part, f"{name}[{key!r}]", needed) for key, part in dataset.items()]
        return {key: columns for part in parts for key, columns in part.items()}
    columns = _columns(dataset)
    if columns is None:
        raise ValueError(f"{name} is empty. Pass a dataset with at least one row.")
    missing = [column for column in needed if column not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column {missing[0]!r} (it has {columns}). Add it, or rename the one that holds it: "
            f"dataset.rename_column(..., {missing[0]!r})."
        )
    return {name: columns}


def _columns(dataset: Any) -> list[str] | None:
    """The columns of a dataset as its rows have them, after any transform; None if it has no rows."""
    if hasattr(dataset, "__len__"):
        if len(dataset) == 0:
            return None
        return list(dataset[0])
    first = next(iter(dataset), None)
    return None if first is None else list(first)
