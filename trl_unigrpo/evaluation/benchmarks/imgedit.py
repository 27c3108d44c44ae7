"""ImgEdit-Bench (arXiv 2505.20275), its basic suite: nine kinds of edits of photographs."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark, Item
from ..metrics import edit_mean
from .edits import as_file_name, edit_and_quality_questions
from .rows import parse


INSTRUCTIONS = "basic_edit.json"
ROOTS = (".", "singleturn", "Benchmark/singleturn", "original_images")
"""Folders, beside the instructions, in which the photographs may lie."""


def load_imgedit(path: str | Path) -> Benchmark:
    """
    Read `basic_edit.json`, or the folder that holds it, and the photographs beside it: of each key `id`, the path of a
    photograph, `prompt` and `edit_type`.
    """
    file = Path(path) / INSTRUCTIONS if Path(path).is_dir() else Path(path)
    items, problems = parse(_rows(file), partial(_items, folder=file.parent))
    return Benchmark(
        "imgedit",
        "ImgEdit-Bench",
        items,
        problems,
        metric=edit_mean,
        overall="tasks",
        notes=(
            "Officially GPT-4o gives three scores out of 5 by instructions for each kind of edit; here their mean is "
            "that of the probabilities of three yes-no questions in our words.",
        ),
    )


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file. Pass ImgEdit's {INSTRUCTIONS}, or the folder that holds it.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object with an edit under each key.")
    for key, row in found.items():
        yield f"{file.name}, {key}", {"key": key, **row} if isinstance(row, dict) else row


def _items(row: dict[str, Any], where: str, folder: Path) -> Iterable[Item]:
    key, photograph, instruction, task = (row[name] for name in ("key", "id", "prompt", "edit_type"))
    if not isinstance(task, str) or not task:
        raise ValueError(f"'edit_type' is {task!r}, expected the kind of edit")
    found = [file for root in ROOTS if (file := folder / root / str(photograph)).is_file()]
    if not found:
        raise ValueError(f"there is no photograph {photograph!r} in {folder} or its folders {', '.join(ROOTS[1:])}")
    questions = edit_and_quality_questions(instruction)
    return [
        Item(as_file_name(key), instruction, task, questions, row, source_images=(found[0],), official=f"{key}.png")
    ]
