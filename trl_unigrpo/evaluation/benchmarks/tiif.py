"""TIIF-Bench (arXiv 2506.02161): each instruction in a short and a long form, and yes-no questions with answers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...rewards.questions.question import Question
from ..benchmark import Benchmark, Item
from ..metrics import accuracy
from .rows import (
    Found,
    as_object,
    located_rows,
    once,
    parse,
    row_problem,
    texts,
)


FOLDERS = ("testmini_prompts", "testmini_eval_prompts")
"""Prompts to paint and questions to ask, in the benchmark's own `data` folder."""


def load_tiif(path: str | Path) -> Benchmark:
    """
    Read the benchmark's `data` folder: `testmini_prompts` with `type`, `short_description` and `long_description`, and
    `testmini_eval_prompts` with `type`, `yn_question_list` and `yn_answer_list`, which belong together by type and
    line. Or a file or folder of rows that have all of these.

    A task is a type in one of its two forms; its score is the share of all its questions that were answered as the
    file says, and overall the mean of the tasks. The two forms of a row are one cluster.
    """
    path = Path(path)
    places = [path / name for name in FOLDERS] if (path / FOLDERS[0]).is_dir() else [path]
    found, repeated = once(row for place in places for row in located_rows(place, ".jsonl"))
    rows, unjoined = joined(found)
    items, problems = parse(rows, _items)
    return Benchmark(
        "tiif",
        "TIIF-Bench",
        items,
        (*repeated, *unjoined, *problems),
        metric=accuracy,
        overall="tasks",
        pooled=True,
        notes=("Questions are asked one at a time; the official script asks all of an image in one request.",),
    )


def joined(rows: Iterable[Found]) -> tuple[list[Found], list[str]]:
    """Join rows of one type and line; returns them and the problems of those that can't be joined."""
    found: dict[tuple[str, str], tuple[list[str], dict[str, Any]]] = {}
    problems = []
    for where, row in rows:
        try:
            row = as_object(row)
            places, whole = found.setdefault((str(row["type"]), where.rpartition(" ")[2]), ([], {}))
            if both := sorted(whole.keys() & row.keys() - {"type"}):
                raise ValueError(f"{both[0]!r} of this type and line is in {places[0]}, too")
            places.append(where)
            whole.update(row)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{where}: {row_problem(error)}")
    return [(" and ".join(places), row) for places, row in found.values()], problems


def _items(row: dict[str, Any], where: str) -> Iterable[Item]:
    asked, expected = texts(row, "yn_question_list"), texts(row, "yn_answer_list")
    if len(asked) != len(expected):
        raise ValueError(f"{len(asked)} questions and {len(expected)} answers")
    questions = tuple(
        Question(text.strip(), answer.strip().lower(), group=str(row["type"]))
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
