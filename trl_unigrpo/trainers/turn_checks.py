"""Checks of stories: rows whose column `turns` has all that the user asks for, one image a turn."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ..messages import user_text
from .prompt_checks import shortened
from .source_checks import dataset_parts


TURN_COLUMN = "turns"
"""Column of a story: texts, the first of them the prompt."""


def check_turns(datasets: Mapping[str, Any], args: Any) -> bool:
    """
    Find out whether this is a run of stories.

    Args:
        datasets: by argument name; None where there is none. What is streamed, or made by a transform, is checked as
            it comes.
        args: the configuration.

    Raises:
        ValueError: for a row without turns, or with too many, in such a run, and for settings that don't go with one.
    """
    parts = [(key, *part) for key, value in datasets.items() for part in dataset_parts({key: value})]
    without = [name for _, name, dataset in parts if TURN_COLUMN not in next(iter(dataset), {})]
    if len(without) == len(parts):
        return False
    if without:
        raise ValueError(
            f"{without[0]} has no column {TURN_COLUMN!r}, but another dataset of this run has: its rows would be no "
            "stories. Add the turns, or leave them out everywhere."
        )
    _check_settings(args)
    for key, name, dataset in parts:
        if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
            most = args.num_rounds if key == "train_dataset" else args.eval_num_rounds or args.num_rounds
            texts = dataset.select_columns(["prompt", TURN_COLUMN]).with_format(None)
            for number, row in enumerate(zip(texts["prompt"], texts[TURN_COLUMN], strict=True)):
                check_story(dict(zip(("prompt", TURN_COLUMN), row, strict=True)), most, f"{name}: row {number}")
    return True


def _check_settings(args: Any) -> None:
    for name, reason in (
        ("reflection_template", "what is said to an image is the next turn"),
        ("no_improve", "each turn asks for something else, so that no image is to improve on the one before"),
        ("remove_unused_columns", "it takes the turns away before they are asked for"),
    ):
        if getattr(args, name) != getattr(type(args), name):
            raise ValueError(
                f"{name}={getattr(args, name)!r} does not work with a column {TURN_COLUMN!r}: {reason}. Leave it at "
                "its default, or rename the column."
            )


def check_story(row: Mapping[str, Any], most: int, name: str = "A row") -> None:
    """Raise ValueError for a row that is no story of at most so many turns."""
    if (fault := _fault(row, most)) is not None:
        raise ValueError(f"{name} with the prompt {shortened(row['prompt'])} {fault}")


def _fault(row: Mapping[str, Any], most: int) -> str | None:
    turns = row.get(TURN_COLUMN)
    if not isinstance(turns, (list, tuple)) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        return (
            f"has the turns {shortened(turns)}, expected a list of texts, one an image. Leave such rows out: "
            "dataset.filter(lambda row: row['turns']); or rename the column, if it holds something else."
        )
    if len(turns) > most:
        return f"has {len(turns)} turns, but a trajectory has at most {most} images. Set num_rounds={len(turns)}."
    if turns[0].strip() != user_text(row["prompt"]).strip():
        return f"begins with the turn {turns[0]!r}: the first turn is the prompt itself. Put the prompt before it."
    return None
