"""The vocabulary of ShapeWorld, and the meanings of its prompts.

An image is a 3 x 3 grid of cells. A cell is empty or holds one shape of one colour, written as one integer code:

    -1                        unreadable (only ever produced by the verifier)
     0                        empty
     1 + 5 * color + shape    a shape; color indexes `COLORS`, shape indexes `SHAPES`

`PromptSpec` says what a prompt asks for, in words; `encode_specs` turns a batch of them into arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..statistics import BoolArray


IntArray = NDArray[np.int64]

COLORS = ("red", "green", "blue", "yellow", "pink", "cyan")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
SPATIAL_RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("one", "two", "three", "four", "five")

THINGS = {
    "fire": "red",
    "blood": "red",
    "grass": "green",
    "frog": "green",
    "sea": "blue",
    "blueberry": "blue",
    "sun": "yellow",
    "lemon": "yellow",
    "pig": "pink",
    "flamingo": "pink",
    "pool": "cyan",
    "glacier": "cyan",
}
"""Things that have one colour, for prompts such as "a circle in the color of grass"."""

FEATURES = {
    "three sides": "triangle",
    "four sides": "square",
    "twelve sides": "cross",
    "a hole": "ring",
}
"""Properties that tell a shape without naming it."""

GRID_SIDE = 3
NUM_CELLS = GRID_SIDE * GRID_SIDE
NUM_CODES = 1 + len(COLORS) * len(SHAPES)
EMPTY = 0
UNREADABLE = -1
MAX_OBJECTS = 5
"""The most objects that a prompt asks for, and that a plan holds."""
MAX_GROUPS = 3
"""The most groups of alike objects in one prompt."""
MAX_PROMPT_WORDS = 12

THINK_START = "<think>"
THINK_END = "</think>"

REGIONS: dict[str, tuple[int, ...]] = {
    "in the top row": (0, 1, 2),
    "in the middle row": (3, 4, 5),
    "in the bottom row": (6, 7, 8),
    "in the left column": (0, 3, 6),
    "in the middle column": (1, 4, 7),
    "in the right column": (2, 5, 8),
}
"""Lines of the grid as sets of cell indices, row by row from the top left."""
CORNERS = (0, 2, 6, 8)

_OTHER_WORDS = (
    "a and plus minus at in of with the color colored shape shapes sides hole opposite row column middle corner "
    "corners above below twelve"
)
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [THINK_START, THINK_END, *COLORS, *SHAPES, *PLURALS.values(), *PLACES, *NUMBERS]
        + _OTHER_WORDS.split()
        + list(THINGS)
    )
)
"""Every word of every prompt and every plan."""

SEEING_WORDS = (
    *("make", "remove", "move", "swap", "up", "down"),
    *("is", "empty", "unclear", "request", "repair", "image", "or", "keep"),
)
"""Further words: of instructions to edit an image, and of a second look at one."""


@dataclass(frozen=True)
class ObjectGroup:
    """`count` objects that are alike. `None` leaves the property to the painter.

    Args:
        count: how many, 1 to `MAX_OBJECTS`.
        color: one of `COLORS`, or `None`.
        shape: one of `SHAPES`, or `None`. Color and shape are never both `None`.
        cells: the cell indices (0 to 8) in which all of them must lie, or `None`.
    """

    count: int
    color: str | None = None
    shape: str | None = None
    cells: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PromptSpec:
    """The meaning of a prompt. No object can belong to two groups of one spec.

    Args:
        category: one of `trl_unigrpo.shapeworld.grammar.CATEGORIES`.
        family: the form of the prompt within its category.
        groups: the groups in the order in which the prompt names them, at most `MAX_GROUPS`.
        relation: one of `SPATIAL_RELATIONS`, holding between the first and the second group, or `None`.
    """

    category: str
    family: str
    groups: tuple[ObjectGroup, ...]
    relation: str | None = None

    @property
    def num_objects(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def content(self) -> str:
        """The meaning as a string: equal for two prompts that the same images satisfy, whatever their wording."""
        groups, relation = list(self.groups), self.relation
        if relation in ("right of", "below"):
            groups, relation = groups[::-1], "left of" if relation == "right of" else "above"
        parts = [f"{g.count} {g.color} {g.shape} {'' if g.cells is None else sorted(g.cells)}" for g in groups]
        return f"; {relation}; ".join(parts) if relation else "; ".join(sorted(parts))


def cell_colors(cells: IntArray) -> IntArray:
    """Give the colour index 0 to 5 of each code; -1 where the cell is empty or unreadable. Any shape of array."""
    return np.where(cells > 0, (cells - 1) // len(SHAPES), -1)


def cell_shapes(cells: IntArray) -> IntArray:
    """Give the shape index 0 to 4 of each code; -1 where the cell is empty or unreadable. Any shape of array."""
    return np.where(cells > 0, (cells - 1) % len(SHAPES), -1)


def cell_code(color: str, shape: str) -> int:
    """Give the code of a cell that holds this object, for example `cell_code("red", "circle") == 1`."""
    return 1 + COLORS.index(color) * len(SHAPES) + SHAPES.index(shape)


def _relation_table() -> BoolArray:
    """Tabulate if cell a stands in the relation to cell b: `table[relation, a, b]`."""
    rows, columns = np.divmod(np.arange(NUM_CELLS), GRID_SIDE)
    left, above = columns[:, None] < columns[None], rows[:, None] < rows[None]
    return np.stack([left, left.T, above, above.T])


RELATION_TABLE = _relation_table()


@dataclass(frozen=True)
class SpecArrays:
    """A batch of B specs as arrays, padded to G = `MAX_GROUPS` groups.

    Args:
        count: (B, G), 0 for padding.
        color: (B, G), index into `COLORS`, -1 for any.
        shape: (B, G), index into `SHAPES`, -1 for any.
        region: (B, G, 9), the cells allowed to each group; all true where the prompt names none.
        relation: (B,), index into `SPATIAL_RELATIONS`, -1 for none.
    """

    count: IntArray
    color: IntArray
    shape: IntArray
    region: BoolArray
    relation: IntArray

    def __len__(self) -> int:
        return len(self.count)

    def take(self, rows: IntArray) -> SpecArrays:
        """Take the specs at the given indices."""
        return SpecArrays(self.count[rows], self.color[rows], self.shape[rows], self.region[rows], self.relation[rows])


@cache
def _encode(spec: PromptSpec) -> tuple[IntArray, BoolArray, int]:
    table = np.full((3, MAX_GROUPS), -1, dtype=np.int64)
    table[0] = 0
    region = np.ones((MAX_GROUPS, NUM_CELLS), dtype=bool)
    for i, group in enumerate(spec.groups):
        table[0, i] = group.count
        table[1, i] = -1 if group.color is None else COLORS.index(group.color)
        table[2, i] = -1 if group.shape is None else SHAPES.index(group.shape)
        if group.cells is not None:
            region[i] = np.isin(np.arange(NUM_CELLS), group.cells)
    return table, region, -1 if spec.relation is None else SPATIAL_RELATIONS.index(spec.relation)


def encode_specs(specs: list[PromptSpec]) -> SpecArrays:
    """Turn B specs into arrays. Each spec is encoded once per process."""
    encoded = [_encode(spec) for spec in specs]
    tables = np.array([e[0] for e in encoded], dtype=np.int64).reshape(-1, 3, MAX_GROUPS)
    regions = np.array([e[1] for e in encoded], dtype=bool).reshape(-1, MAX_GROUPS, NUM_CELLS)
    relation = np.array([e[2] for e in encoded], dtype=np.int64)
    return SpecArrays(tables[:, 0], tables[:, 1], tables[:, 2], regions, relation)
