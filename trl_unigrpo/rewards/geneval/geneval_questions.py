"""Questions from GenEval's metadata, by rule: no model is asked."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..questions.question import Question
from .rules import is_count, read_clauses, read_position


# GenEval's relations, as they stand in a sentence.
RELATION_WORDS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def questions_from_geneval(metadata: Mapping[str, Any]) -> tuple[Question, ...]:
    """
    Turn one row of GenEval's metadata (arXiv 2310.11513) into questions.

    Each object that the image should have gives the question whether it is there, and, as that one's children, its
    number, colour and place. "At most n - 1" of `exclude` makes "at least" of a number "exactly", or stands alone.

    Args:
        metadata: `include` and, *optional*, `exclude`: lists of `{"class", "count", "color", "position"}`, where
            `position` is `[relation, place of the other object in include]`. Other keys are not looked at.

    Raises:
        ValueError: for metadata that is not of this form.
    """
    include = read_clauses(metadata, "include")
    if not include:
        known = ", ".join(sorted(map(str, metadata)))
        raise ValueError(f"GenEval metadata has no object in 'include': there is nothing to ask (it has: {known}).")
    limits = {item["class"]: _count(item) for item in read_clauses(metadata, "exclude")}
    questions = [_presence(item["class"]) for item in include]  # at the same places as the objects
    for place, item in enumerate(include):
        questions += _details(place, item, include, limits)
    wanted = {item["class"] for item in include}
    for name, limit in limits.items():
        if name in wanted:
            continue
        asked = _presence(name) if limit == 1 else Question(f"{_number(name)} {limit} or more?")
        questions.append(Question(asked.text, expected="no"))
    return tuple(questions)


def _details(
    place: int, item: Mapping[str, Any], include: Sequence[Mapping[str, Any]], limits: Mapping[str, int]
) -> list[Question]:
    """Ask about the number, colour and place of one object."""
    name, count, details = item["class"], _count(item), []
    limit = limits.get(name)
    if limit is not None and limit <= count:
        raise ValueError(f"GenEval metadata includes {count} of the class {name!r} and excludes {limit} of it.")
    if limit == count + 1:
        details.append(Question(f"{_number(name)} exactly {count}?", parents=(place,)))
    elif count > 1 or limit is not None:
        bounds = f"at least {count}" + (f" and less than {limit}" if limit is not None else "")
        details.append(Question(f"{_number(name)} {bounds}?", parents=(place,)))
    if "color" in item:
        details.append(Question(f"Is the {name} in the image {item['color']}?", parents=(place,)))
    if "position" in item:
        relation, other = read_position(item)
        if other == place or other >= len(include):
            raise ValueError(f"GenEval clause {item!r}: there is no other object at place {other}.")
        text = f"Is the {name} in the image {RELATION_WORDS[relation]} the {include[other]['class']}?"
        details.append(Question(text, parents=(place, other)))
    return details


def _presence(name: str) -> Question:
    article = "an" if name[0].lower() in "aeiou" else "a"
    return Question(f"Is there {article} {name} in the image?")


def _number(name: str) -> str:
    # Without a plural, which has no rule: knife, sheep, person.
    return f'Is the number of objects of the kind "{name}" in the image'


def _count(item: Mapping[str, Any]) -> int:
    count = item.get("count", 1)
    if not is_count(count):
        raise ValueError(f"GenEval metadata: count={count!r} of the class {item['class']!r}, expected 1 or more.")
    return int(count)
