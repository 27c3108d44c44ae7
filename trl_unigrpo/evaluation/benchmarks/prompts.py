"""A user's own prompts, with or without questions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...models.sources import source_fault
from ...rewards.questions.question import read_questions
from ..benchmark import Benchmark, Item, Painting
from ..metrics import accuracy, edit_quality
from .edits import edit_and_quality_questions
from .rows import (
    FORMATS,
    as_object,
    located_rows,
    once,
    parse,
)


SOURCES = ("source_image", "source_images")


def load_own_prompts(path: str | Path) -> Benchmark:
    """
    Read a csv, json, jsonl, parquet or txt file with a column `prompt`.

    Optional are `questions`, in a form of [`read_questions`], as `trl-unigrpo decompose` writes them, and `tag`, the
    task that a prompt is counted with. With questions this is the form of UniGRPO's own evaluation (TA): several
    images of each prompt, each scored by the mean of its exam points. Where one row has questions all must.

    With `source_image`, or a list `source_images`, prompts say how to edit, and a judge is asked as for GEdit-Bench.
    Where one row has source images all must.
    """
    rows, repeated = once(located_rows(path, *FORMATS))
    asked = any(isinstance(row, dict) and row.get("questions") for _, row in rows)

    edits = any(isinstance(row, dict) and any(row.get(name) for name in SOURCES) for _, row in rows)

    def to_items(row: dict[str, Any], where: str) -> Iterable[Item]:
        row, sources = dict(as_object(row)), ()
        if edits:
            sources = _sources([value for name in SOURCES if (value := row.pop(name, None)) is not None])
        if asked:
            questions = read_questions(row.get("questions"))
        else:
            questions = edit_and_quality_questions(row["prompt"]) if edits else ()
        yield Item(where, row["prompt"], str(row.get("tag") or "all"), questions, row, source_images=sources)

    items, problems = parse(rows, to_items)
    return Benchmark(
        "prompts",
        Path(path).name,
        items,
        (*repeated, *problems),
        metric=accuracy if asked else edit_quality if edits else None,
        painting=Painting(samples=4),
    )


def _sources(values: list[Any]) -> tuple[Any, ...]:
    found = values[0] if values and isinstance(values[0], (list, tuple)) else values
    if (fault := source_fault(list(found))) is not None:
        raise ValueError(f"the source image is {fault}")
    return tuple(found)
