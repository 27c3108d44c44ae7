"""Checks of the user's data, before anything expensive."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..messages import all_texts
from ..models.tokenizer import check_text, special_tokens
from .prompt_checks import check_prompts
from .source_checks import SOURCE_COLUMNS


IMAGE_COLUMNS = ("image", "images", "generated_images")
EDITED = "; or 'source_image', if the prompts say how it is to be edited"
TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""Names under which reward functions get something else than a column."""


def check_training_data(dataset: Any, args: Any) -> dict[str, list[str]]:
    """
    Check the prompts that UniGRPO trains on, as [`check_dataset`] does, and that they fill a generation batch.

    Raises:
        TypeError: for what TRL can't draw prompts from.
    """
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"train_dataset is a {type(dataset).__name__} of {list(dataset)}, expected one dataset: pass one of them, "
            f"as in train_dataset[{next(iter(dataset), 'train')!r}]."
        )
    columns = check_dataset(dataset, "train_dataset")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"train_dataset is a {type(dataset).__name__}, expected a datasets.Dataset or IterableDataset. Make one "
            "of a list of rows: Dataset.from_list(rows)."
        )
    _check_length(dataset, args, args.generation_batch_size // args.num_generations)
    return columns


def check_rows(
    dataset: Any, name: str, needed: Sequence[str], args: Any, shown: Sequence[str] = ()
) -> dict[str, list[str]]:
    """
    Raise ValueError for a dataset of another trainer that lacks a column or a prompt, or that fills no batch.

    Args:
        dataset: a dataset, streamed or not, or a dict of them.
        name: what to call it in the message.
        needed: its columns, `prompt` among them.
        args: the configuration, for a dataset to train on; else None.
        shown: columns of source images that the trainer knows.

    Returns:
        The columns of each dataset by its name.
    """
    columns = check_columns(dataset, name, needed)
    for part, found in columns.items():
        if sources := [column for column in found if column in SOURCE_COLUMNS and column not in shown]:
            raise ValueError(
                f"{part} has a column {sources[0]!r}, which this trainer does not show to the model. Train edits with "
                f"UniGRPOTrainer, or leave the column out: dataset.remove_columns({sources[0]!r})."
            )
    check_prompts(dataset, name, captions=bool(shown))
    if args is not None and args.dataloader_drop_last:
        _check_length(dataset, args, args.train_batch_size * args.world_size)
    return columns


def _check_length(dataset: Any, args: Any, least: int) -> None:
    if hasattr(dataset, "__len__") and len(dataset) < least:
        raise ValueError(f"train_dataset has {len(dataset)} rows: {too_few_rows(args)}")


def too_few_rows(args: Any) -> str:
    """Say how many rows the first batch takes, and what to do where there are fewer."""
    processes = f" on {args.world_size} processes" if args.world_size > 1 else ""
    if not hasattr(args, "generation_batch_size"):
        return (
            f"the first batch takes {args.train_batch_size * args.world_size} rows (per_device_train_batch_size="
            f"{args.per_device_train_batch_size}{processes}). Lower it, set dataloader_drop_last=False, or give more "
            "rows."
        )
    return (
        f"a generation batch takes {args.generation_batch_size // args.num_generations} (generation_batch_size="
        f"{args.generation_batch_size} of num_generations={args.num_generations} each), and smaller ones are left "
        f"out, so that nothing would be trained. Lower per_device_train_batch_size={args.per_device_train_batch_size}"
        f"{processes} or steps_per_generation={args.steps_per_generation}, which make the batch, or repeat the "
        "prompts: datasets.concatenate_datasets([dataset] * 10)."
    )


def check_dataset(dataset: Any, name: str) -> dict[str, list[str]]:
    """
    Raise ValueError if a dataset of prompts can't be trained on or evaluated.

    Args:
        dataset: a `datasets` dataset, streamed or not, or a dict of them.
        name: what to call it in the message.

    Returns:
        The columns of each dataset by its name.
    """
    found = check_columns(dataset, name, ("prompt",))
    for part, columns in found.items():
        for column in columns:
            if column in IMAGE_COLUMNS:
                told, other = "the painted images as `images`", "reference_image"
            elif column in TAKEN:
                told, other = f"something else as `{column}`", f"own_{column}"
            else:
                continue
            raise ValueError(
                f"{part} has a column {column!r}, a name that is taken: reward functions get {told}. Rename it: "
                f"dataset.rename_column({column!r}, {other!r})"
                f"{EDITED if column in IMAGE_COLUMNS else ''}."
            )
    check_prompts(dataset, name)
    return found


def check_columns(dataset: Any, name: str, needed: Sequence[str]) -> dict[str, list[str]]:
    """Raise ValueError if a dataset is empty or lacks a column; returns the columns of each dataset by its name."""
    if isinstance(dataset, Mapping):
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
    special = special_tokens(tokenizer).values()
    for name, dataset in datasets.items():
        if isinstance(dataset, dict):
            check_special_tokens({f"{name}[{key!r}]": part for key, part in dataset.items()}, tokenizer)
        elif isinstance(dataset, Dataset):
            for column in {"prompt", "completion"} & set(dataset.column_names):
                for row, value in enumerate(dataset[column]):
                    if isinstance(value, (str, list)):
                        check_text(all_texts(value), special, f"Row {row} of {name}")
            for row, turns in enumerate(dataset["turns"] if "turns" in dataset.column_names else ()):
                if isinstance(turns, list):
                    check_text([turn for turn in turns if isinstance(turn, str)], special, f"Row {row} of {name}")


def _columns(dataset: Any) -> list[str] | None:
    """The columns of a dataset as its rows have them, after any transform; None if it has no rows."""
    if hasattr(dataset, "__len__"):
        if len(dataset) == 0:
            return None
        return list(dataset[0])
    first = next(iter(dataset), None)
    return None if first is None else list(first)
