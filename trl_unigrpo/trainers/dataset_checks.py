"""Checks of the user's data, before anything expensive."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..messages import all_texts
from ..models.tokenizer import check_text


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


def check_special_tokens(datasets: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raise ValueError, naming the row, if a prompt or a completion holds the text of a special token.

    Args:
        datasets: by argument name; those that are streamed are checked as they come.
    """
    for name, dataset in datasets.items():
        if isinstance(dataset, dict):
            check_special_tokens({f"{name}[{key!r}]": part for key, part in dataset.items()}, tokenizer)
        elif isinstance(dataset, Dataset):
            for column in {"prompt", "completion"} & set(dataset.column_names):
                for row, value in enumerate(dataset[column]):
                    if isinstance(value, (str, list)):
                        check_text(all_texts(value), tokenizer, f"Row {row} of {name}")


def _columns(dataset: Any) -> list[str] | None:
    """The columns of a dataset as its rows have them, after any transform; None if it has no rows."""
    if hasattr(dataset, "__len__"):
        if len(dataset) == 0:
            return None
        return list(dataset[0])
    first = next(iter(dataset), None)
    return None if first is None else list(first)
