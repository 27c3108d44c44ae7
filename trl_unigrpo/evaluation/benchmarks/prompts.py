"""A user's own prompts, with or without questions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...rewards.questions.question import read_questions
from ..benchmark import Benchmark, Item, Painting
from ..metrics import accuracy
from .rows import (
    FORMATS,
    as_object,
    located_rows,
    once,
    parse,
)


def load_own_prompts(path: str | Path) -> Benchmark:
    """
    Read a csv, json, jsonl, parquet or txt file with a column `prompt`.

    Optional are `questions`, in a form of [`read_questions`], as `trl-unigrpo decompose` writes them, and `tag`, the
    task that a prompt is counted with. With questions this is the form of UniGRPO's own evaluation (TA): several
    images of each prompt, each scored by the mean of its exam points. Where one row has questions all must.
    """
    rows, repeated = once(located_rows(path, *FORMATS))
    asked = any(isinstance(row, dict) and row.get("questions") for _, row in rows)

    def to_items(row: dict[str, Any], where: str) -> Iterable[Item]:
        questions = read_questions(as_object(row).get("questions")) if asked else ()
        yield Item(where, row["prompt"], str(row.get("tag") or "all"), questions, row)

    items, problems = parse(rows, to_items)
    return Benchmark(
        "prompts",
        Path(path).name,
        items,
        (*repeated, *problems),
        metric=accuracy if asked else None,
        painting=Painting(samples=4),
    )
