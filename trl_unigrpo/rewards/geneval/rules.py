"""GenEval's rules (arXiv 2310.11513) as pure functions of what a detector found.

A row asks for objects:

    {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"},
                                      {"class": "cat", "count": 1, "position": ["left of", 0]}],
     "exclude": [{"class": "dog", "count": 2}]}

`position` is relative to the objects of the clause of that number. `exclude` forbids so many objects or more.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_PER_CLASS = 16
POSITION_MARGIN = 0.1
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Detection:
    """
    One object in an image.

    Args:
        label: its class.
        score: in [0, 1].
        box: left, top, right, bottom in pixels, right and bottom exclusive.
        mask: (H, W) of bool, its pixels in the image; None if there is only the box.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_] | None = None


Objects = Mapping[str, Sequence[Detection]]
ColorsOf = Callable[[Sequence[Detection]], Sequence[str]]
"""Names the colour of each of these objects, all of one class."""


def read_row(row: Mapping[str, Any] | str, classes: Collection[str] | None = None) -> dict[str, Any]:
    """
    Read a row in GenEval's form, from a mapping or its JSON; values that are None count as absent.

    Args:
        classes: those that the detector knows; any are allowed if not given.

    Raises:
        ValueError: for a row that asks for nothing, or for what cannot be checked.
    """
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"GenEval row {row!r} is no JSON ({error}).") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"GenEval row {row!r}: expected a mapping with 'include', or its JSON.")
    include, exclude = read_clauses(row, "include"), read_clauses(row, "exclude")
    if not include:
        raise ValueError(f"GenEval row {dict(row)!r}: expected at least one clause in 'include'.")
    for clause in [*include, *exclude]:
        if not is_count(clause.get("count")):
            raise ValueError(f"GenEval clause {clause!r}: expected a 'count' of at least 1, a whole number.")
        if classes is not None and clause["class"] not in classes:
            raise ValueError(
                f"GenEval clause {clause!r}: the detector knows no such 'class'. It knows: "
                f"{', '.join(sorted(classes))}."
            )
    for index, clause in enumerate(include):
        if clause.get("color", GENEVAL_COLORS[0]) not in GENEVAL_COLORS:
            raise ValueError(f"GenEval clause {clause!r}: expected a 'color' of {', '.join(GENEVAL_COLORS)}.")
        if "position" in clause and read_position(clause)[1] >= index:
            raise ValueError(
                f"GenEval clause {clause!r}: expected a 'position' relative to an earlier clause than this one, which "
                f"has the number {index}."
            )
    return {"tag": row.get("tag"), "include": include, "exclude": exclude}


def read_clauses(row: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the clauses below a key, each with a class and without values that are None."""
    clauses = row.get(key)
    if clauses is None:
        return []
    if not isinstance(clauses, (list, tuple)) or not all(isinstance(clause, Mapping) for clause in clauses):
        raise ValueError(
            f"GenEval row {dict(row)!r}: expected a list of clauses in {key!r}, as in "
            '[{"class": "dog", "count": 1}].'
        )
    for clause in clauses:
        if not isinstance(clause.get("class"), str) or not clause["class"]:
            raise ValueError(f"GenEval clause {dict(clause)!r}: expected a 'class', the name of an object.")
    return [{name: value for name, value in clause.items() if value is not None} for clause in clauses]


def is_count(value: Any) -> bool:
    """Say whether it is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def read_position(clause: Mapping[str, Any]) -> tuple[str, int]:
    """Read a clause's relation and the number of the clause that it is relative to; ValueError if it is none."""
    match clause["position"]:
        case (str(relation), int(number)) if relation in RELATIONS and number >= 0 and not isinstance(number, bool):
            return relation, number
    raise ValueError(
        f"GenEval clause {clause!r}: expected a 'position' of one of {', '.join(RELATIONS)} and the number of a "
        'clause, counted from 0, as in ["left of", 0]. Tables make a text of the number: store such rows as JSON.'
    )


def confident_objects(detections: Sequence[Detection], tag: str | None = None) -> dict[str, list[Detection]]:
    """
    Sort the detections that count by class, the surest first: score above 0.3, or 0.9 where the tag is "counting", at
    most 16 of each class.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    counted = [detection for detection in detections if detection.score > threshold]
    for detection in sorted(counted, key=lambda found: -found.score):
        same = objects.setdefault(detection.label, [])
        if len(same) < MAX_PER_CLASS:
            same.append(detection)
    return objects


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """
    Say where box a lies, seen from box b; nothing if they overlap too much to say, two relations on a diagonal.

    The offset o of the centres is shortened on each axis by 0.1 of both boxes' sizes s,
    d = max(|o| - 0.1 (s_a + s_b), 0); a relation holds where d / ||o|| > 0.5 on its axis.
    """
    box_a, box_b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset = box_a.mean(0) - box_b.mean(0)
    sizes = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])
    clear = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0) * np.sign(offset)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    x, y = clear / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def all_related(relation: str, found: Sequence[Detection], targets: Sequence[Detection]) -> bool:
    """Say whether each of `found` lies so to each of `targets`."""
    return all(relation in relations(one.box, target.box) for one in found for target in targets)


def strict_score(row: Mapping[str, Any], objects: Objects, colors_of: ColorsOf) -> float:
    """
    Return 1 if everything that the row asks for holds, else 0: GenEval's own rule.

    Of each class the `count` surest objects are looked at, so that more of them is no fault unless `exclude` says so.
    """
    matched: list[Sequence[Detection] | None] = []
    for clause in row["include"]:
        count = clause["count"]
        found = list(objects.get(clause["class"], ()))[:count]
        holds = len(found) == count
        if holds and "color" in clause:
            holds = list(colors_of(found)).count(clause["color"]) == count
        if holds and "position" in clause:
            relation, index = clause["position"]
            targets = matched[index]
            holds = targets is not None and all_related(relation, found, targets)
        matched.append(found if holds else None)
    forbidden = any(len(objects.get(clause["class"], ())) >= clause["count"] for clause in row["exclude"])
    return float(None not in matched and not forbidden)


def partial_score(row: Mapping[str, Any], objects: Objects, colors_of: ColorsOf) -> float:
    """
    Average the credit of all that the row's `include` asks for, as Flow-GRPO trains on (arXiv 2505.05470).

    Of n objects of a class, `1 - |n - found| / n`, below 0 where more than 2n are there. If exactly n are found: of a
    colour `1 - |n - so coloured| / n`, of a position 1 or 0. Else these get 0, and so does a position relative to a
    clause that does not hold. (In Flow-GRPO's own code a wrong position gets 0 and then 1 as well.)
    """
    credits: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in row["include"]:
        count = clause["count"]
        found = list(objects.get(clause["class"], ()))
        holds = len(found) == count
        credits.append(1 - abs(count - len(found)) / count)
        if "color" in clause:
            colored = list(colors_of(found)).count(clause["color"]) if holds else 0
            holds = holds and colored == count
            credits.append(1 - (count - colored) / count)
        if "position" in clause:
            relation, index = clause["position"]
            targets = matched[index]
            holds = holds and targets is not None and all_related(relation, found, targets)
            credits.append(float(holds))
        matched.append(found if holds else None)
    return sum(credits) / len(credits)
