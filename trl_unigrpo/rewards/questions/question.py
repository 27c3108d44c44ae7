"""Yes-no questions about an image, and how their answers add up.

A question is answered with P(yes) in [0, 1], or `None` where the judge failed. What it earns is the probability of the
answer that was expected: p, or 1 - p where "no" was. Aggregators turn the answers of one image into one score.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ..common import Scores


@dataclass(frozen=True)
class Question:
    """
    One yes-no question about an image.

    Args:
        text: the question.
        expected: "yes" or "no", the answer of an image that follows its prompt.
        group: what it is counted with, such as "semantic" or "quality".
        parents: places, from 0, in the same list, of questions without which this one makes no sense ("Is the dog
            brown?" has the parent "Is there a dog?").
        weight: in means, above 0.

    Raises:
        TypeError, ValueError: for a value that is none of these.
    """

    text: str
    expected: str = "yes"
    group: str = "semantic"
    parents: tuple[int, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("text", "group"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name}={value!r}: expected a text that is not empty.")
        if self.expected not in ("yes", "no"):
            raise ValueError(f"expected={self.expected!r} of the question {self.text!r}: write 'yes' or 'no'.")
        parents: Any = self.parents
        if not isinstance(parents, (list, tuple)):
            raise TypeError(f"parents={parents!r} of the question {self.text!r}: expected a list of places.")
        object.__setattr__(self, "parents", tuple(parents))
        for parent in self.parents:
            if not isinstance(parent, int) or isinstance(parent, bool) or parent < 0:
                raise ValueError(f"parent {parent!r} of the question {self.text!r}: expected a place, counted from 0.")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"weight={weight!r} of the question {self.text!r}: expected a number above 0.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Question":
        """Read a question from a dataset's row; keys that are missing or None have their defaults."""
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"A question has no key {unknown[0]!r}: expected some of {known}.")
        if data.get("text") is None:
            raise ValueError(f"A question without 'text': {dict(data)!r}.")
        return cls(**{name: value for name, value in data.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and for a dataset's column."""
        return {**asdict(self), "parents": list(self.parents)}


def read_questions(cell: Any, group: str = "semantic") -> tuple[Question, ...]:
    """
    Read the questions in a cell of a dataset.

    Args:
        cell: a list of texts, of dictionaries or of [`Question`]s, or such a list as JSON.
        group: of questions that name none.

    Raises:
        TypeError, ValueError: if there are none, or one can't be read, or parents are unknown or in a circle.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError as error:
            raise ValueError(f"{cell[:60]!r} is no JSON list of questions ({error}).") from error
    if cell is None or (isinstance(cell, Sequence) and len(cell) == 0):
        raise ValueError("There are no questions. Write some, or leave the row out.")
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        raise TypeError(f"Questions are a {type(cell).__name__}, expected a list of texts or dictionaries.")
    questions = tuple(_question(item, group) for item in cell)
    evaluation_order(questions)
    return questions


def _question(item: Any, group: str) -> Question:
    if isinstance(item, Question):
        return item
    if isinstance(item, str):
        return Question(item, group=group)
    if isinstance(item, Mapping):
        named = item if item.get("group") is not None else {**item, "group": group}
        return Question.from_dict(named)
    raise TypeError(f"A question is a {type(item).__name__}, expected a text or a dictionary.")


def evaluation_order(questions: Sequence[Question]) -> list[int]:
    """
    Order the places of the questions, parents first; ValueError for parents that are not there or wait for each other.
    """
    for place, question in enumerate(questions):
        unknown = [parent for parent in question.parents if parent >= len(questions)]
        if unknown:
            raise ValueError(
                f"Question {place} ({question.text!r}) has the parent {unknown[0]}, but the last of these "
                f"{len(questions)} questions is {len(questions) - 1}: places are counted from 0."
            )
    graph = {place: question.parents for place, question in enumerate(questions)}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ValueError(f"Questions are each other's parents, in a circle: {error.args[1]}.") from error


def earned(questions: Sequence[Question], answers: Scores) -> Scores:
    """Return the probability, in [0, 1], of the answer that was expected; None where there is none."""
    pairs = zip(questions, answers, strict=True)
    return [p if p is None or question.expected == "yes" else 1 - p for question, p in pairs]


def weighted_mean(questions: Sequence[Question], answers: Scores) -> float | None:
    """Compute sum w e / sum w over the answered questions, e what each earned; None if none was answered."""
    return _mean(questions, earned(questions, answers))


def geometric_mean(questions: Sequence[Question], answers: Scores) -> float | None:
    """Compute (prod e^w)^(1 / sum w) over the answered questions: one question that earned 0 makes the score 0."""
    pairs = [(q.weight, e) for q, e in zip(questions, earned(questions, answers), strict=True) if e is not None]
    if not pairs:
        return None
    if any(e == 0 for _, e in pairs):
        return 0.0
    return math.exp(sum(w * math.log(e) for w, e in pairs) / sum(w for w, _ in pairs))


def dependency_mean(questions: Sequence[Question], answers: Scores) -> float | None:
    """
    Compute the weighted mean in which a question counts 0 where a parent was not answered as expected, as in
    DPG-Bench.

    A parent that earned less than 0.5, or counts 0 itself, zeroes its children. A parent without an answer leaves its
    children without one, unless another parent zeroes them.
    """
    counted = earned(questions, answers)
    for place in evaluation_order(questions):
        parents = [counted[parent] for parent in questions[place].parents]
        if any(parent is not None and parent < 0.5 for parent in parents):
            counted[place] = 0.0
        elif None in parents:
            counted[place] = None
    return _mean(questions, counted)


def exam_points(questions: Sequence[Question], answers: Scores) -> float | None:
    """Compute the weighted share of the answered questions whose answer was right: that earned 0.5 or more."""
    points = [None if e is None else float(e >= 0.5) for e in earned(questions, answers)]
    return _mean(questions, points)


def dv_score(questions: Sequence[Question], answers: Scores) -> float | None:
    """
    Compute sqrt(semantic mean * quality mean), the reward of AlphaGRPO (arXiv 2605.12495).

    Returns:
        None if one of the groups has no answer at all.

    Raises:
        ValueError: if the groups are not these two.
    """
    means = group_means(questions, answers)
    if set(means) != {"semantic", "quality"}:
        raise ValueError(f"Questions are in the groups {sorted(means)}, expected both 'quality' and 'semantic'.")
    semantic, quality = means["semantic"], means["quality"]
    return None if semantic is None or quality is None else math.sqrt(semantic * quality)


def group_means(questions: Sequence[Question], answers: Scores) -> dict[str, float | None]:
    """Compute the weighted mean of each group."""
    rows: dict[str, tuple[list[Question], Scores]] = {}
    for question, answer in zip(questions, answers, strict=True):
        members, given = rows.setdefault(question.group, ([], []))
        members.append(question)
        given.append(answer)
    return {group: weighted_mean(*row) for group, row in rows.items()}


def _mean(questions: Sequence[Question], values: Scores) -> float | None:
    pairs = [(q.weight, value) for q, value in zip(questions, values, strict=True) if value is not None]
    return sum(w * value for w, value in pairs) / sum(w for w, _ in pairs) if pairs else None
