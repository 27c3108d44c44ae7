"""GenEval 2 (arXiv 2512.16853): prompts of many atoms, scored by Soft-TIFA. Its data is CC BY-NC 4.0."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...rewards.questions.question import Question
from ..benchmark import Benchmark, Item
from ..metrics import soft_tifa
from .rows import located_rows, once, parse


def load_geneval2(path: str | Path) -> Benchmark:
    """
    Read `geneval2_data.jsonl`: `prompt`, `atom_count`, `vqa_list` of [question, answer], and `skills`.

    A task is a number of atoms, as the official analysis has it; groups of questions are the skills.
    """
    rows, repeated = once(located_rows(path, ".jsonl"))
    items, problems = parse(rows, _items)
    return Benchmark(
        "geneval2",
        "GenEval 2",
        items,
        (*repeated, *problems),
        metric=soft_tifa,
        soft=True,
        notes=(
            "Judges here answer yes or no: an open question is asked together with its answer, and a score is "
            "P(yes) / (P(yes) + P(no)). Officially it is the probability of the answer's own word.",
        ),
    )


def _items(row: dict[str, Any], where: str) -> Iterable[Item]:
    pairs, skills = row["vqa_list"], row["skills"]
    if not isinstance(pairs, list) or not pairs or not isinstance(skills, list) or len(pairs) != len(skills):
        raise ValueError("'vqa_list' and 'skills' are not lists of one length, or empty")
    if not isinstance(row["atom_count"], int):
        raise ValueError(f"'atom_count' is {row['atom_count']!r}, expected a whole number")
    questions = tuple(
        yes_no(question, answer, str(skill)) for (question, answer), skill in zip(pairs, skills, strict=True)
    )
    return [Item(where, row["prompt"], f"{row['atom_count']:02} atoms", questions, row)]


def yes_no(question: Any, answer: Any, skill: str) -> Question:
    """Turn a question and its answer into a question that is answered by yes or no."""
    if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"a pair of 'vqa_list' is {[question, answer]!r}, expected two texts")
    word = answer.strip().lower()
    if word in ("yes", "no"):
        return Question(question, word, group=skill)
    return Question(f'{question} Is the right answer "{answer.strip()}"?', group=skill)
