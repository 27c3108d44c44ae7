"""Checks of the source images that a dataset has beside its instructions, before anything expensive."""

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from datasets import List as ListFeature

from ..image_sizes import read_square
from ..models.sources import source_fault, source_size
from .sizes_config import largest_divisor


SOURCE_COLUMNS = ("source_image", "source_images")
"""Columns of an editing run: one image a row, or a list of them."""


def check_sources(datasets: Mapping[str, Any], args: Any) -> bool:
    """
    Find out whether this is an editing run, whose prompts say how their source images are to be changed.

    Args:
        datasets: by argument name; None where there is none. What is streamed, or made by a transform, is checked as
            it comes.
        args: the configuration.

    Raises:
        ValueError: for a row without source images in an editing run, and for settings that don't go with one.
    """
    parts = dict(dataset_parts(datasets))
    columns = {name: source_column(dataset, name) for name, dataset in parts.items()}
    if not any(columns.values()):
        return False
    for name, column in columns.items():
        if column is None:
            raise ValueError(
                f"{name} has neither a column 'source_image' nor 'source_images', but another dataset of this run "
                "has: its prompts would be painted from text alone. Add the images, or leave them out everywhere."
            )
        _check_rows(parts[name], column, name)
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=True takes the source images away before the model sees them. Leave it False."
        )
    for option in ("image_size", "eval_image_size"):
        if (size := getattr(args, option)) is not None:
            read_square(size, option)
    batch, group = args.per_device_train_batch_size, args.num_generations
    if args.flow_weight > 0 and group % batch and not (batch % group == 0 and _one_size(parts["train_dataset"])):
        raise ValueError(
            f"per_device_train_batch_size={batch} does not divide num_generations={group}: images of one update have "
            "one size, and each group's follows from its source image. Choose one that does, such as "
            f"{largest_divisor(group, batch)}, or, where all source images have one size, a multiple."
        )
    return True


def source_column(dataset: Any, name: str) -> str | None:
    """Name a dataset's column with source images; None if it has none, ValueError if it has both."""
    first: Mapping[str, Any] = next(iter(dataset), {})
    found = [column for column in SOURCE_COLUMNS if column in first]
    if len(found) > 1:
        raise ValueError(f"{name} has both columns, 'source_image' and 'source_images': leave one of them out.")
    return found[0] if found else None


def dataset_parts(datasets: Mapping[str, Any], within: str = "{}") -> Iterator[tuple[str, Any]]:
    """Walk through datasets, and those in dicts: what to call each in a message, and the dataset."""
    for key, dataset in datasets.items():
        name = within.format(key)
        if isinstance(dataset, Mapping):
            yield from dataset_parts(dataset, f"{name}[{{!r}}]")
        elif dataset is not None:
            yield name, dataset


def _check_rows(dataset: Any, column: str, name: str) -> None:
    """Raise ValueError for the first row whose source images can't be read. No image is decoded."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    for row, value in enumerate(_undecoded(dataset, column)):
        if (fault := source_fault(value)) is not None:
            raise ValueError(f"{name}: the {column} of row {row} is {fault}. {LEAVE_OUT.format(column)}")


def _one_size(dataset: Any) -> bool:
    """Say whether the first source images of all rows are known to have one size; only their headers are read."""
    column = source_column(dataset, "train_dataset")
    if column is None or not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return False
    first = (value[0] if isinstance(value, list) else value for value in _undecoded(dataset, column))
    return len({source_size(value) for value in first}) == 1


def _undecoded(dataset: Dataset, column: str) -> Iterator[Any]:
    """Go through a column of images, or of lists of images, without decoding any."""
    undecoded = dataset.select_columns([column]).with_format(None)
    feature = undecoded.features[column]
    if isinstance(feature, ImageFeature):
        undecoded = undecoded.cast_column(column, ImageFeature(decode=False))
    elif isinstance(getattr(feature, "feature", None), ImageFeature):
        undecoded = undecoded.cast_column(column, ListFeature(ImageFeature(decode=False)))
    for batch in undecoded.iter(batch_size=100):
        yield from batch[column]


LEAVE_OUT = "Leave such rows out: dataset.filter(lambda row: row[{!r}] is not None)."
