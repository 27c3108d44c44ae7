"""Checks of the user's data, before anything expensive."""

from typing import Any


IMAGE_COLUMNS = ("image", "images", "generated_images")


def check_dataset(dataset: Any, name: str) -> None:
    """
    Raise ValueError if a dataset can't be trained on.

    Args:
        dataset: a `datasets` dataset, streamed or not, or a dict of them.
        name: what to call it in the message.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]")
        return
    columns = _columns(dataset)
    if columns is None:
        raise ValueError(f"{name} is empty. Pass a dataset with at least one prompt.")
    if "prompt" not in columns:
        raise ValueError(
            f"{name} has no column 'prompt' (it has {columns}). Rename the column that holds the prompts: "
            "dataset.rename_column(..., 'prompt')."
        )
    taken = [column for column in IMAGE_COLUMNS if column in columns]
    if taken:
        raise ValueError(
            f"{name} has a column {taken[0]!r}, a name that is taken: reward functions get the generated images as "
            f"`images`. Rename it: dataset.rename_column({taken[0]!r}, 'reference_image')."
        )


def _columns(dataset: Any) -> list[str] | None:
    """The columns of a dataset, if need be those of its first row; None if it has no rows."""
    if hasattr(dataset, "__len__"):
        if len(dataset) == 0:
            return None
        return list(getattr(dataset, "column_names", None) or dataset[0])
    first = next(iter(dataset), None)
    return None if first is None else list(first)
