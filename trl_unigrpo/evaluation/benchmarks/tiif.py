"""TIIF-Bench (arXiv 2506.02161): each instruction in a short and a long form, and yes-no questions with answers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...rewards.questions import Question
from ..benchmark import Benchmark, Item
from ..metrics import accuracy
from .rows import parse, read_rows, texts


def load(path: str | Path) -> Benchmark:
    """
    Read a file of the evaluation prompts, or a folder of them (`testmini_eval_prompts`): `type`, `short_description`,
    `long_description`, `yn_question_list` and `yn_answer_list`.

    A task is a type in one of its two forms; its score is the share of all its questions that were answered as the
    file says, and overall the mean of the tasks. The two forms of a row are one cluster.
    """
    items, problems = parse(read_rows(path, ".jsonl"), _items)
    return Benchmark(
        "tiif",
        "TIIF-Bench",
        items,
        problems,
        metric=accuracy,
        overall="tasks",
        pooled=True,
        notes=("Questions are asked one at a time; the official script asks all of a picture in one request.",),
    )


def _items(row: dict[str, Any], where: str) -> Iterable[Item]:
    asked, expected = texts(row, "yn_question_list"), texts(row, "yn_answer_list")
    if len(asked) != len(expected):
        raise ValueError(f"{len(asked)} questions and {len(expected)} answers")
    questions = tuple(
        Question(text, answer.strip().lower(), group=str(row["type"]))
        for text, answer in zip(asked, expected, strict=True)
    )
    return [
        Item(
            key=f"{where}, {form}",
            prompt=row[f"{form}_description"],
            task=f"{row['type']}/{form}",
            questions=questions,
            columns=row,
            cluster=where,
        )
        for form in ("short", "long")
    ]
