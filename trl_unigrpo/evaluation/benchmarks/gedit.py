"""GEdit-Bench (arXiv 2504.17761): images and how to edit them. Its file is checked; no model here edits yet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rows import (
    as_object,
    located_rows,
    row_problem,
    undecoded,
)


EDIT_TASKS = (
    *("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change"),
    *("subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer"),
)
LANGUAGES = ("en", "cn")


def check(path: str | Path) -> tuple[int, list[str]]:
    """
    Count the edits that can be read in the benchmark's folder or file, and list the problems of the others.

    Expected are `key`, `task_type`, `instruction`, `instruction_language` and `input_image`.
    """
    good, problems = 0, []
    for where, row in _rows(Path(path)):
        try:
            _check_row(as_object(row))
            good += 1
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{where}: {row_problem(error)}")
    return good, problems


def load_gedit(path: str | Path) -> Any:
    """Raise always: NotImplementedError for a file that is in order, ValueError for one with no edit to read."""
    good, problems = check(path)
    shown = "".join(f"\n  {problem}" for problem in problems[:10])
    if not good:
        raise ValueError(f"{path}: no edit of GEdit-Bench can be read.{shown}")
    raise NotImplementedError(
        f"{path}: {good} edits of GEdit-Bench read, {len(problems)} not.{shown}\nGEdit-Bench can't be painted yet: it "
        "needs a model that takes the image to edit into its context (its clean VAE tokens, and what the "
        "understanding tower sees), and `generate` passes text alone. Nothing was painted."
    )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        found = load_from_disk(str(path))
        for name, part in found.items() if hasattr(found, "items") else [("data", found)]:
            for number, row in enumerate(undecoded(part)):
                yield f"{name}, row {number}", row
    else:
        yield from located_rows(path, ".parquet", ".jsonl")


def _check_row(row: dict[str, Any]) -> None:
    if row["task_type"] not in EDIT_TASKS:
        raise ValueError(f"'task_type' is {row['task_type']!r}, expected one of {', '.join(EDIT_TASKS)}")
    if row["instruction_language"] not in LANGUAGES:
        raise ValueError(f"'instruction_language' is {row['instruction_language']!r}, expected 'en' or 'cn'")
    for name in ("key", "instruction"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{name!r} is {row[name]!r}, expected a text that is not empty")
    if row["input_image"] is None:
        raise ValueError("'input_image' is empty")
