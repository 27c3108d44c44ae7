"""DPG-Bench (ELLA, arXiv 2403.05135): long prompts, and questions that hang on each other."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...rewards.questions.question import Question, evaluation_order
from ..benchmark import Benchmark, Item, Painting
from ..metrics import dependency_score
from .rows import (
    Found,
    as_object,
    located_rows,
    once,
    row_problem,
)


def load_dpg(path: str | Path) -> Benchmark:
    """
    Read `dpg_bench.csv`: a line per question, with `item_id`, `text` (the prompt), `proposition_id`, `dependency`
    (ids of the questions before it, 0 for none), `tuple` and `question_natural_language`.

    A prompt with a line that can't be read is left out as a whole: by fewer questions it would be another one.
    """
    rows, repeated = once(located_rows(path, ".csv"), _known_by)
    items, problems = prompts(rows)
    return Benchmark(
        "dpg",
        "DPG-Bench",
        tuple(items),
        (*repeated, *problems),
        metric=dependency_score,
        painting=Painting(samples=4),
        notes=(
            "Official numbers are judged by mPLUG-large. The official script skips the first line of questions; "
            "this counts it.",
        ),
    )


def prompts(rows: Iterable[Found]) -> tuple[list[Item], list[str]]:
    """Collect the prompts with their questions, in the file's order, and the problems."""
    lines: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    broken: dict[str, str] = {}
    problems: list[str] = []
    current = ""
    for where, row in rows:
        try:
            row = as_object(row)
            current = row["item_id"].strip()
            if not current:
                raise ValueError("'item_id' is empty")
            lines.setdefault(current, []).append((where, row))
            _number(row, "proposition_id"), _parents(row), _question(row, ())
        except (KeyError, TypeError, ValueError) as error:
            # A line without an id stands among its prompt's.
            if current:
                broken[current] = where
            problems.append(
                f"{where}: {row_problem(error)}" + (f"; the prompt {current!r} is left out" if current else "")
            )
    items = []
    for name, own in lines.items():
        if name in broken:
            continue
        try:
            items.append(_item(name, [row for _, row in own]))
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{own[0][0]}: {row_problem(error)}; the prompt {name!r} is left out")
    return items, problems


def _known_by(row: dict[str, Any]) -> tuple[Any, Any]:
    says = ("text", "dependency", "question_natural_language")
    return {name: row[name] for name in ("item_id", "proposition_id")}, [row[name] for name in says]


def _item(name: str, rows: list[dict[str, Any]]) -> Item:
    ids = [_number(row, "proposition_id") for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"'proposition_id' is repeated: {ids}")
    questions = []
    for row in rows:
        unknown = [parent for parent in _parents(row) if parent not in ids]
        if unknown:
            raise ValueError(f"'dependency' names {unknown[0]}, but the prompt's questions are {ids}")
        questions.append(_question(row, tuple(ids.index(parent) for parent in _parents(row))))
    evaluation_order(questions)
    columns = {"item_id": name, "questions": [question.to_dict() for question in questions]}
    return Item(name, rows[0]["text"].strip(), "all", tuple(questions), columns)


def _question(row: dict[str, Any], parents: tuple[int, ...]) -> Question:
    category = (row.get("tuple") or "").split("(")[0].split("-")[0].strip()
    return Question(row["question_natural_language"], group=category or "other", parents=parents)


def _number(row: dict[str, Any], name: str) -> int:
    text = row[name].strip()
    if not text.isdecimal():
        raise ValueError(f"{name!r} is {text!r}, expected a whole number")
    return int(text)


def _parents(row: dict[str, Any]) -> tuple[int, ...]:
    parts = [part.strip() for part in row["dependency"].split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"'dependency' is {row['dependency']!r}, expected whole numbers with commas, 0 for none")
    return tuple(int(part) for part in parts if int(part))
