"""A second look at an image of ShapeWorld: what is wrong in it, how it is said, and how well.

    <think> green circle left red cross top </think> left red circle      or      <think> .. </think> keep

The thinking says what is seen, in the words of a plan; what follows says what to paint in which cells.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

from ..messages import content_text, user_text
from ..rewards.thinking import thinking_reward
from .grammar import parse_prompt
from .verifier import images_to_array, read_cells
from .world import (
    COLORS,
    EMPTY,
    NUM_CELLS,
    PLACES,
    RELATION_TABLE,
    SHAPES,
    SPATIAL_RELATIONS,
    THINK_END,
    THINK_START,
    UNREADABLE,
    IntArray,
    ObjectGroup,
    PromptSpec,
    cell_code,
    cell_colors,
    cell_shapes,
)


REFLECTION_TEMPLATE = "request {prompt} repair the image or keep"
"""Words that the model is told behind its image, before it looks at it again."""
KEEP = "keep"
"""The answer that leaves an image as it is."""
MAX_REFLECTION_LENGTH = 32
"""Tokens that what is said of an image has at most."""

Cells = Mapping[int, int]
"""Cell index (0 to 8) -> code."""


def _name(code: int) -> str:
    if code <= EMPTY:
        return "empty" if code == EMPTY else "unclear"
    return f"{COLORS[int(cell_colors(np.array(code)))]} {SHAPES[int(cell_shapes(np.array(code)))]}"


_NAMES = {code: _name(code) for code in range(UNREADABLE, 1 + len(COLORS) * len(SHAPES))}


@dataclass(frozen=True)
class Reflection:
    """
    The words of a second look, read.

    Attributes:
        seen: what cells are said to look like: all that are not empty, or those that an edit is about.
        fixes: what is to be painted in which cells; nothing where the image is to be kept.
    """

    seen: Cells
    fixes: Cells

    @property
    def text(self) -> str:
        """The words; where nothing is said about the image, the single word `keep`."""
        if not self.seen and not self.fixes:
            return KEEP
        seen = [f"{_NAMES[code]} {PLACES[cell]}" for cell, code in self.seen.items()]
        fixes = [f"{PLACES[cell]} {_NAMES[code]}" for cell, code in self.fixes.items()]
        return " ".join([THINK_START, *seen, THINK_END, *(fixes or [KEEP])])


def parse_reflection(text: str) -> Reflection | None:
    """Read a reflection, the inverse of `Reflection.text`; `None` for any other text."""
    words = text.split()
    if words == [KEEP]:
        return Reflection({}, {})
    if words[:1] != [THINK_START] or words.count(THINK_END) != 1:
        return None
    end = words.index(THINK_END)
    seen, fixes = _read(_SEEN, words[1:end]), _read(_FIX, words[end + 1 :])
    if words[end + 1 :] == [KEEP]:
        fixes = {}
    elif not fixes:
        return None
    return None if seen is None or fixes is None else Reflection(seen, fixes)


_CODES = {name: code for code, name in _NAMES.items()}
_SEEN, _FIX = (
    re.compile(pattern.format(name=f"(?P<name>{'|'.join(_CODES)})", place=f"(?P<place>{'|'.join(PLACES)})"))
    for pattern in ("{name} {place}(?: |$)", "{place} {name}(?: |$)")
)


def _read(one: re.Pattern[str], words: Sequence[str]) -> dict[int, int] | None:
    """Read what is said of cells, each in words of one form; None for other words, or two of one cell."""
    text, cells = " ".join(words), dict[int, int]()
    at = 0
    while at < len(text):
        found = one.match(text, at)
        if found is None or (cell := PLACES.index(found["place"])) in cells:
            return None
        cells[cell], at = _CODES[found["name"]], found.end()
    return cells


def closest_scene(spec: PromptSpec, cells: IntArray, blamed: Collection[int] = ()) -> IntArray:
    """
    Find the scene (9,) that passes every check of a prompt and differs from a scene (9,) in the fewest cells.

    Of several, it takes one that differs in the `blamed` cells, then one that keeps most colours and shapes. What the
    prompt leaves open is kept where there is something to keep, else the first colour or shape.
    """
    groups, counts = spec.groups, tuple(group.count for group in spec.groups)
    blame = [100 * (cell in blamed) for cell in range(NUM_CELLS)]
    empty = [0 if code == EMPTY else 10_000 - blame[cell] for cell, code in enumerate(cells)]
    filled = [[_cost(group, cell, int(cells[cell]), blame[cell]) for cell in range(NUM_CELLS)] for group in groups]
    if spec.relation is not None:
        table = RELATION_TABLE[SPATIAL_RELATIONS.index(spec.relation)]
        costs: dict[tuple[int, int], int] = {
            (a, b): filled[0][a] - empty[a] + filled[1][b] - empty[b]
            for a, b in product(range(NUM_CELLS), repeat=2)
            if table[a, b]
        }
        first, second = min(costs, key=lambda pair: costs[pair])
        chosen = {first: 0, second: 1}
    else:
        chosen = _assign(counts, empty, filled)
    target = np.full(NUM_CELLS, EMPTY, dtype=np.int64)
    for cell, number in chosen.items():
        target[cell] = _filled(groups[number], int(cells[cell]))
    return target


_NEVER = 10**9


def _cost(group: ObjectGroup, cell: int, code: int, blame: int) -> int:
    if group.cells is not None and cell not in group.cells:
        return _NEVER
    new = _filled(group, code)
    if new == code:
        return 0
    kept = (
        0
        if code <= EMPTY
        else int(cell_colors(np.array(new)) == cell_colors(np.array(code)))
        + int(cell_shapes(np.array(new)) == cell_shapes(np.array(code)))
    )
    return 10_000 - blame + 2 - kept


def _filled(group: ObjectGroup, code: int) -> int:
    """Give the code of an object of a group where a cell of this code is."""
    color = group.color or COLORS[max(0, int(cell_colors(np.array(code))))]
    shape = group.shape or SHAPES[max(0, int(cell_shapes(np.array(code))))]
    return cell_code(color, shape)


def _assign(counts: tuple[int, ...], empty: list[int], filled: list[list[int]]) -> dict[int, int]:
    """Choose cells for so many objects of each group, at the least cost: cell -> group. Cell by cell."""
    best: dict[tuple[int, ...], tuple[int, dict[int, int]]] = {counts: (0, {})}
    for cell in range(NUM_CELLS):
        after: dict[tuple[int, ...], tuple[int, dict[int, int]]] = {}
        for left, (cost, chosen) in best.items():
            options = [(left, cost + empty[cell], chosen)]
            for group, number in enumerate(left):
                if number and filled[group][cell] < _NEVER:
                    rest = (*left[:group], number - 1, *left[group + 1 :])
                    options.append((rest, cost + filled[group][cell], {**chosen, cell: group}))
            for rest, price, choice in options:
                if rest not in after or price < after[rest][0]:
                    after[rest] = price, choice
        best = after
    return best[(0,) * len(counts)][1]


def diagnosis_f1(spec: PromptSpec, cells: IntArray, text: str) -> float:
    """
    Score what a second look found in a scene (9,): F1 between the cells that it would change and those that are wrong.

    Where the image can be mended in several ways, the one that is nearest to the diagnosis counts. Keeping a right
    image scores 1, a text that can't be read 0.
    """
    reflection = parse_reflection(text)
    if reflection is None:
        return 0.0
    named = {cell for cell, code in reflection.fixes.items() if code != cells[cell]}
    wrong = set(np.flatnonzero(closest_scene(spec, cells, blamed=named) != cells).tolist())
    return 2 * len(named & wrong) / (len(named) + len(wrong)) if named or wrong else 1.0


@thinking_reward
def shapeworld_diagnosis_reward(
    prompts: Sequence[str | list[dict[str, Any]]],
    completions: Sequence[Any],
    previous_images: Sequence[Sequence[Image.Image]],
    **kwargs: Any,
) -> list[float | None]:
    """
    Give the F1 of each diagnosis, in [0, 1]; None before there is an image: a TRL reward function of second looks.

    Args:
        prompts: B prompts of the grammar, plain or conversational (the last user message counts).
        completions: what was said about the images, plain or conversational.
        previous_images: for each the images of 48 x 48 pixels so far, of which the last was looked at.
    """
    found: list[float | None] = [None] * len(prompts)
    looked = [row for row, images in enumerate(previous_images) if images]
    if looked:
        cells, _ = read_cells(images_to_array([previous_images[row][-1] for row in looked]))
        for row, scene in zip(looked, cells, strict=True):
            text = completions[row]
            text = text if isinstance(text, str) else content_text(text[-1]["content"])
            found[row] = diagnosis_f1(parse_prompt(user_text(prompts[row])), scene, text)
    return found


shapeworld_diagnosis_reward.every_round = True  # type: ignore[attr-defined]
