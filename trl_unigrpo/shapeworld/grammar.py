"""The prompts of ShapeWorld: every sentence of the grammar, what it means, and the split that it belongs to.

The grammar is small enough to be written out whole (some 28,000 prompts), so that reading a prompt is looking it up:
`parse_prompt` is the exact inverse of the generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations, product

from .world import (
    COLORS,
    CORNERS,
    FEATURES,
    MAX_OBJECTS,
    MAX_PROMPT_WORDS,
    NUM_CELLS,
    NUMBERS,
    PLACES,
    PLURALS,
    REGIONS,
    SHAPES,
    SPATIAL_RELATIONS,
    THINGS,
    WORDS,
    ObjectGroup,
    PromptSpec,
)


SPLITS = ("train", "validation", "test")

FAMILIES: dict[str, dict[str, float]] = {
    "single_object": {"plain": 0.3, "place": 0.4, "region": 0.3},
    "two_object": {"shapes": 0.15, "colors": 0.1, "mixed": 0.25, "one_place": 0.25, "two_places": 0.25},
    "counting": {"plain": 0.55, "region": 0.45},
    "color_attr": {"pair": 0.7, "triple": 0.3},
    "groups": {"groups": 1.0},
    "position": {"colored": 0.8, "shapes": 0.2},
    "reasoning": {
        "arithmetic": 0.3,
        "arithmetic_groups": 0.1,
        "color_of": 0.1,
        "feature": 0.1,
        "colored_pair": 0.2,
        "colored_feature": 0.1,
        "opposite": 0.1,
    },
}
"""Category -> family -> its share of the category's draws. Within a family all prompts are equally likely."""
CATEGORIES = tuple(FAMILIES)

Entry = tuple[str, tuple[ObjectGroup, ...], str | None]
"""A prompt's text, its groups, and the relation between the first two."""


def _word(count: int) -> str:
    return NUMBERS[count - 1]


def _noun(group: ObjectGroup, number: str | None = None) -> str:
    """Name a group without its place, as "a red circle", "two circles" or "three red shapes"."""
    singular, plural = (group.shape, PLURALS[group.shape]) if group.shape else ("shape", "shapes")
    number = number or ("a" if group.count == 1 else _word(group.count))
    return " ".join(word for word in (number, group.color, singular if group.count == 1 else plural) if word)


def _nouns(count: int, cells: tuple[int, ...] | None = None) -> list[ObjectGroup]:
    """List all groups of this size that name a shape, a colour or both."""
    colors, shapes = [*COLORS, None], [*SHAPES, None]
    return [ObjectGroup(count, c, s, cells) for c, s in product(colors, shapes) if c or s]


def _different_pairs() -> Iterator[tuple[str, str, str, str]]:
    """List (color, shape, color, shape) with both colours and both shapes different."""
    for (c1, c2), (s1, s2) in product(permutations(COLORS, 2), permutations(SHAPES, 2)):
        yield c1, s1, c2, s2


def _and(*groups: ObjectGroup) -> Entry:
    return " and ".join(_noun(group) for group in groups), groups, None


def _single_object(family: str) -> Iterator[Entry]:
    if family == "plain":
        for group in _nouns(1):
            yield _noun(group), (group,), None
    elif family == "place":
        for i, place in enumerate(PLACES):
            for group in _nouns(1, (i,)):
                yield f"{_noun(group)} at {place}", (group,), None
    else:
        for phrase, cells in {**REGIONS, "in a corner": CORNERS}.items():
            for group in _nouns(1, cells):
                yield f"{_noun(group)} {phrase}", (group,), None


def _two_object(family: str) -> Iterator[Entry]:
    if family == "colors":
        for c1, c2 in permutations(COLORS, 2):
            yield _and(ObjectGroup(1, c1), ObjectGroup(1, c2))
        return
    for s1, s2 in permutations(SHAPES, 2):
        first, second = ObjectGroup(1, None, s1), ObjectGroup(1, None, s2)
        if family == "shapes":
            yield _and(first, second)
        elif family == "mixed":
            for color in COLORS:
                yield _and(ObjectGroup(1, color, s1), second)
                yield _and(first, ObjectGroup(1, color, s2))
        elif family == "one_place":
            for i, place in enumerate(PLACES):
                there1, there2 = ObjectGroup(1, None, s1, (i,)), ObjectGroup(1, None, s2, (i,))
                yield f"{_noun(first)} at {place} and {_noun(second)}", (there1, second), None
                yield f"{_noun(first)} and {_noun(second)} at {place}", (first, there2), None
        else:
            for i, j in permutations(range(NUM_CELLS), 2):
                placed = (ObjectGroup(1, None, s1, (i,)), ObjectGroup(1, None, s2, (j,)))
                yield f"{_noun(first)} at {PLACES[i]} and {_noun(second)} at {PLACES[j]}", placed, None


def _counting(family: str) -> Iterator[Entry]:
    if family == "plain":
        for count in range(2, MAX_OBJECTS + 1):
            for group in _nouns(count):
                yield _noun(group), (group,), None
        return
    for phrase, cells in {**REGIONS, "in the corners": CORNERS}.items():
        for count in range(2, len(cells) + 1):
            for group in _nouns(count, cells):
                yield f"{_noun(group)} {phrase}", (group,), None


def _color_attr(family: str) -> Iterator[Entry]:
    if family == "pair":
        for one, other in permutations(product(COLORS, SHAPES), 2):
            yield _and(ObjectGroup(1, *one), ObjectGroup(1, *other))
    else:
        for colors, shapes in product(permutations(COLORS, 3), permutations(SHAPES, 3)):
            yield _and(*(ObjectGroup(1, c, s) for c, s in zip(colors, shapes, strict=True)))


def _groups(family: str) -> Iterator[Entry]:
    for n1, n2 in product(range(1, MAX_OBJECTS), repeat=2):
        # Two single objects are attribute binding; four and one would make five of nine cells one group's.
        if 3 <= n1 + n2 <= MAX_OBJECTS and max(n1, n2) < 4:
            for c1, s1, c2, s2 in _different_pairs():
                yield _and(ObjectGroup(n1, c1, s1), ObjectGroup(n2, c2, s2))


def _position(family: str) -> Iterator[Entry]:
    if family == "colored":
        pairs = [(ObjectGroup(1, c1, s1), ObjectGroup(1, c2, s2)) for c1, s1, c2, s2 in _different_pairs()]
    else:
        pairs = [(ObjectGroup(1, None, s1), ObjectGroup(1, None, s2)) for s1, s2 in permutations(SHAPES, 2)]
    for (first, second), relation in product(pairs, SPATIAL_RELATIONS):
        yield f"{_noun(first)} {relation} {_noun(second)}", (first, second), relation


def _sums(count: int) -> list[str]:
    """List all ways to say `count` as a sum or a difference of numbers from one to five."""
    plus = [f"{_word(a)} plus {_word(count - a)}" for a in range(1, count)]
    return plus + [f"{_word(a)} minus {_word(a - count)}" for a in range(count + 1, MAX_OBJECTS + 1)]


def _reasoning(family: str) -> Iterator[Entry]:
    if family == "arithmetic":
        for count, color, shape in product(range(2, MAX_OBJECTS + 1), COLORS, SHAPES):
            group = ObjectGroup(count, color, shape)
            for number in _sums(count):
                yield _noun(group, number), (group,), None
    elif family == "arithmetic_groups":
        for count, (c1, s1, c2, s2) in product(range(2, MAX_OBJECTS), _different_pairs()):
            first, second = ObjectGroup(count, c1, s1), ObjectGroup(1, c2, s2)
            for number in _sums(count)[: count - 1]:
                yield f"{_noun(first, number)} and {_noun(second)}", (first, second), None
    elif family == "color_of":
        for (thing, color), shape in product(THINGS.items(), SHAPES):
            yield f"a {shape} in the color of {thing}", (ObjectGroup(1, color, shape),), None
    elif family == "feature":
        for color, (feature, shape) in product(COLORS, FEATURES.items()):
            yield f"a {color} shape with {feature}", (ObjectGroup(1, color, shape),), None
    elif family == "colored_pair":
        for (thing, c1), (s1, s2), c2 in product(THINGS.items(), permutations(SHAPES, 2), COLORS):
            if c1 != c2:
                groups = (ObjectGroup(1, c1, s1), ObjectGroup(1, c2, s2))
                yield f"a {thing} colored {s1} and {_noun(groups[1])}", groups, None
    elif family == "colored_feature":
        for (thing, color), (feature, shape) in product(THINGS.items(), FEATURES.items()):
            yield f"a {thing} colored shape with {feature}", (ObjectGroup(1, color, shape),), None
    else:
        for (i, place), color, shape in product(enumerate(PLACES), COLORS, SHAPES):
            if place != "center":
                group = ObjectGroup(1, color, shape, (NUM_CELLS - 1 - i,))
                yield f"{_noun(group)} opposite {place}", (group,), None


_GENERATORS = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "color_attr": _color_attr,
    "groups": _groups,
    "position": _position,
    "reasoning": _reasoning,
}


@lru_cache(maxsize=1)
def all_prompts() -> dict[str, PromptSpec]:
    """List every prompt of the grammar with its meaning, in a fixed order. Built once per process, in about 0.3 s."""
    prompts: dict[str, PromptSpec] = {}
    for category, families in FAMILIES.items():
        for family in families:
            for text, groups, relation in _GENERATORS[category](family):
                if text in prompts:
                    raise RuntimeError(f"the grammar says {text!r} twice: in {prompts[text]} and in {family!r}")
                prompts[text] = PromptSpec(category, family, groups, relation)
    return prompts


def parse_prompt(text: str) -> PromptSpec:
    """Read what a prompt asks for. White space at the ends and between words is not significant.

    Raises:
        ValueError: the text is not a prompt of this grammar.

    Example:
        >>> parse_prompt("two red circles and a blue square").groups[0]
        ObjectGroup(count=2, color='red', shape='circle', cells=None)
    """
    spec = all_prompts().get(" ".join(text.split()))
    if spec is None:
        unknown = [word for word in text.split() if word not in WORDS]
        why = f"unknown words: {', '.join(map(repr, unknown))}" if unknown else "its words do not form a sentence"
        raise ValueError(
            f"{text!r} is not a ShapeWorld prompt ({why}). Prompts look like 'two red circles and a blue square' and "
            f"have at most {MAX_PROMPT_WORDS} words; take them from trl_unigrpo.shapeworld.dataset."
            "shapeworld_dataset, or use a reward function that reads free text."
        )
    return spec


def split_of(spec: PromptSpec) -> str:
    """Find the split of a prompt: 70 % train, 10 % validation, 20 % test, by a hash of its meaning alone.

    Prompts that the same images satisfy share a split, so that no wording of a test prompt is ever trained on.
    """
    digest = hashlib.blake2b(f"shapeworld-1 {spec.content}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "little") % 10
    return "test" if bucket < 2 else "validation" if bucket < 3 else "train"


@lru_cache(maxsize=1)
def prompts_by_split() -> dict[str, dict[str, PromptSpec]]:
    """Sort the prompts by split: split -> text -> spec, in the order of `all_prompts`."""
    splits: dict[str, dict[str, PromptSpec]] = {split: {} for split in SPLITS}
    for text, spec in all_prompts().items():
        splits[split_of(spec)][text] = spec
    return splits


def sampling_weights(specs: list[PromptSpec]) -> list[float]:
    """Give the chance of each of these prompts in a draw that picks a category, then a family, then a prompt.

    Categories are equally likely, families have the shares of `FAMILIES`. Sums to 1 if every family occurs.
    """
    sizes: dict[tuple[str, str], int] = {}
    for spec in specs:
        sizes[spec.category, spec.family] = sizes.get((spec.category, spec.family), 0) + 1
    return [FAMILIES[s.category][s.family] / (len(CATEGORIES) * sizes[s.category, s.family]) for s in specs]
