"""A finer score than the rule's: the share of yes-no questions about a prompt that its image answers with yes.

The rule asks of each group if an object is right in all that is named of it. The questions ask for colour, shape,
number and place one by one, so that a blue circle earns something where a red one was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image

from ..statistics import BoolArray, FloatArray
from .grammar import parse_prompt
from .verifier import images_to_array, read_cells
from .world import (
    COLORS,
    EMPTY,
    NUM_CELLS,
    NUMBERS,
    RELATION_TABLE,
    SHAPES,
    SPATIAL_RELATIONS,
    IntArray,
    ObjectGroup,
    PromptSpec,
    cell_colors,
    cell_shapes,
)


Answer = Callable[[IntArray], bool]
"""From an image's 9 cells to yes or no."""


def question_points(prompts: Sequence[str], images: Sequence[Image.Image]) -> FloatArray:
    """Give the share of each prompt's questions that its image of 48 x 48 pixels answers with yes: (B,)."""
    cells, _ = read_cells(images_to_array(images))
    return points([parse_prompt(prompt) for prompt in prompts], cells)


def points(specs: Sequence[PromptSpec], cells: IntArray) -> FloatArray:
    """Give the share of each spec's questions that its cells (B, 9) answer with yes: (B,)."""
    return np.array(
        [np.mean([answer(row) for answer in questions(spec).values()]) for spec, row in zip(specs, cells, strict=True)]
    )


def questions(spec: PromptSpec) -> dict[str, Answer]:
    """
    List the questions about a prompt with what answers them.

    Of each group: is its shape there, its colour, one of them, two of them and so on up to their number, exactly that
    number, is one in its place, are all; then the relation, and the number of all objects. A question that two groups
    share is asked once. Unreadable cells are objects of no colour and no shape.
    """
    asked: dict[str, Answer] = {}
    for group in spec.groups:
        asked |= _questions_of(group)
    if spec.relation is not None:
        first, second = spec.groups[:2]
        asked[f"a {_name(first)} {spec.relation} a {_name(second)}?"] = partial(_related, spec.relation, first, second)
    asked[f"{NUMBERS[spec.num_objects - 1]} in all?"] = lambda cells: int((cells != EMPTY).sum()) == spec.num_objects
    return asked


def _questions_of(group: ObjectGroup) -> dict[str, Answer]:
    name, count = _name(group), group.count
    asked: dict[str, Answer] = {}
    if group.color and group.shape:
        for one in (ObjectGroup(1, color=group.color), ObjectGroup(1, shape=group.shape)):
            asked[f"at least one {_name(one)}?"] = partial(_at_least, 1, one)
    for number in range(1, count + 1):
        asked[f"at least {NUMBERS[number - 1]} {name}?"] = partial(_at_least, number, group)
    asked[f"exactly {NUMBERS[count - 1]} {name}?"] = lambda cells: int(_found(group, cells).sum()) == count
    if group.cells is not None:
        place = np.isin(np.arange(NUM_CELLS), group.cells)
        asked[f"a {name} in its place?"] = lambda cells: bool((_found(group, cells) & place).any())
        if count > 1:
            asked[f"every {name} in its place?"] = lambda cells: bool(
                _found(group, cells).any() and not (_found(group, cells) & ~place).any()
            )
    return asked


def _at_least(number: int, group: ObjectGroup, cells: IntArray) -> bool:
    return int(_found(group, cells).sum()) >= number


def _related(relation: str, first: ObjectGroup, second: ObjectGroup, cells: IntArray) -> bool:
    """Say if any object of the first group stands so to any of the second."""
    table = RELATION_TABLE[SPATIAL_RELATIONS.index(relation)]
    return bool((table & _found(first, cells)[:, None] & _found(second, cells)[None]).any())


def _name(group: ObjectGroup) -> str:
    return " ".join(word for word in (group.color, group.shape or "shape") if word)


def _found(group: ObjectGroup, cells: IntArray) -> BoolArray:
    """Mark the cells that hold an object of a group, wherever it should lie: (9,)."""
    found: BoolArray = cells > EMPTY
    if group.color is not None:
        found = found & (cell_colors(cells) == COLORS.index(group.color))
    if group.shape is not None:
        found = found & (cell_shapes(cells) == SHAPES.index(group.shape))
    return found
