"""Instructions to edit an image of ShapeWorld: their sentences, what they do to a scene, and the rule that scores it.

An instruction names an object by its colour and shape ("the red circle") or by its shape and place ("the circle at
center"), and changes one or two cells. All others are to stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np
from PIL import Image

from ..messages import user_text
from ..statistics import BoolArray
from .verifier import ScoreArray, images_to_array, read_cells
from .world import (
    COLORS,
    EMPTY,
    GRID_SIDE,
    NUM_CELLS,
    PLACES,
    SHAPES,
    IntArray,
    cell_code,
    cell_colors,
    cell_shapes,
)


VERBS = ("make", "remove", "move", "swap")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Steps on the grid, (rows, columns)."""


@dataclass(frozen=True)
class Reference:
    """
    Names one object of a scene: by `color` and `shape`, or by `shape` and `cell` (0 to 8).
    """

    shape: str
    color: str | None = None
    cell: int | None = None

    @property
    def text(self) -> str:
        words = ["the", *([self.color] if self.color else []), self.shape]
        return " ".join(words if self.cell is None else [*words, "at", PLACES[self.cell]])

    def find(self, cells: IntArray) -> int | None:
        """Find the cell of the one object that this names in a scene (9,); `None` where it names none, or several."""
        match = cell_shapes(cells) == SHAPES.index(self.shape)
        if self.color is not None:
            match &= cell_colors(cells) == COLORS.index(self.color)
        if self.cell is not None:
            match &= np.arange(NUM_CELLS) == self.cell
        return int(match.argmax()) if match.sum() == 1 else None


@dataclass(frozen=True)
class Edit:
    """
    The meaning of an instruction.

    Args:
        verb: one of `VERBS`.
        reference: the object that it changes.
        color: what "make" makes of it.
        direction: where "move" moves it, by one cell; one of `DIRECTIONS`.
        other: what "swap" swaps it with.
    """

    verb: str
    reference: Reference
    color: str | None = None
    direction: str | None = None
    other: Reference | None = None

    @property
    def text(self) -> str:
        """The instruction, as "make the circle at center blue"."""
        ending = f"and {self.other.text}" if self.other else self.color or self.direction
        return " ".join([self.verb, self.reference.text, *([ending] if ending else [])])

    @property
    def content(self) -> str:
        """The meaning as a string: equal for two instructions that do the same to every scene."""
        names = sorted([self.reference.text, *([self.other.text] if self.other else [])])
        return f"{self.verb} {names} {self.color} {self.direction}"


@lru_cache(maxsize=1)
def all_edits() -> dict[str, Edit]:
    """List every instruction with its meaning, in a fixed order."""
    by_color = [Reference(shape, color) for color, shape in product(COLORS, SHAPES)]
    references = [*by_color, *(Reference(shape, cell=cell) for cell, shape in product(range(NUM_CELLS), SHAPES))]
    edits = [Edit("make", one, color=c) for one, c in product(references, COLORS) if c != one.color]
    edits += [Edit("remove", one) for one in references]
    edits += [Edit("move", one, direction=way) for one, way in product(references, DIRECTIONS)]
    edits += [Edit("swap", one, other=other) for one, other in permutations(by_color, 2)]
    return {edit.text: edit for edit in edits}


def parse_edit(text: str) -> Edit:
    """
    Read what an instruction asks for. White space at the ends and between words is not significant.

    Raises:
        ValueError: the text is not an instruction of this grammar.
    """
    edit = all_edits().get(" ".join(text.split()))
    if edit is None:
        raise ValueError(
            f"{text!r} is not an instruction to edit a ShapeWorld image. Instructions look like 'make the circle at "
            "center blue', 'remove the red circle', 'move the red circle left' or 'swap the red circle and the blue "
            "square'; take them from trl_unigrpo.shapeworld.shapeworld_edit_dataset."
        )
    return edit


def split_of_edit(edit: Edit) -> str:
    """Find the split of an instruction: 70 % train, 10 % validation, 20 % test, by a hash of its meaning alone."""
    digest = hashlib.blake2b(f"shapeworld-edit-1 {edit.content}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "little") % 10
    return "test" if bucket < 2 else "validation" if bucket < 3 else "train"


def changes_of(edit: Edit, cells: IntArray) -> dict[int, int] | None:
    """
    Say what an instruction changes in a scene (9,): cell -> its new code.

    `None` where it can't be followed: it names no object, or several, or moves one off the grid or onto another.
    """
    cell = edit.reference.find(cells)
    if cell is None:
        return None
    code = int(cells[cell])
    if edit.verb == "make":
        assert edit.color is not None
        return {cell: cell_code(edit.color, SHAPES[int(cell_shapes(cells[cell]))])}
    if edit.verb == "remove":
        return {cell: EMPTY}
    if edit.verb == "swap":
        assert edit.other is not None
        other = edit.other.find(cells)
        return None if other is None else {cell: int(cells[other]), other: code}
    assert edit.direction is not None
    (row, column), (down, right) = divmod(cell, GRID_SIDE), DIRECTIONS[edit.direction]
    row, column = row + down, column + right
    inside = 0 <= row < GRID_SIDE and 0 <= column < GRID_SIDE
    there = row * GRID_SIDE + column
    return {cell: EMPTY, there: code} if inside and cells[there] == EMPTY else None


def apply_changes(cells: IntArray, changes: dict[int, int]) -> IntArray:
    """Make changes, cell -> new code, in a copy of a scene (9,)."""
    cells = cells.copy()
    cells[list(changes)] = list(changes.values())
    return cells


def draw_scene(rng: np.random.Generator, fewest: int = 2, most: int = 4) -> IntArray:
    """Draw a scene (9,) of so many objects, no two alike."""
    number = int(rng.integers(fewest, most + 1))
    cells = np.full(NUM_CELLS, EMPTY, dtype=np.int64)
    codes = 1 + rng.permutation(len(COLORS) * len(SHAPES))[:number]
    cells[rng.permutation(NUM_CELLS)[:number]] = codes
    return cells


def draw_edit(cells: IntArray, split: str, rng: np.random.Generator) -> Edit | None:
    """Draw an instruction of a split that a scene (9,) can follow, all verbs alike; `None` where there is none."""
    found = [(int(c), COLORS[cell_colors(cells)[c]], SHAPES[cell_shapes(cells)[c]]) for c in np.flatnonzero(cells > 0)]
    by_color = [Reference(shape, color) for _, color, shape in found]
    for verb in rng.permutation(VERBS):
        if verb == "swap":
            edits = [Edit("swap", one, other=other) for one, other in permutations(by_color, 2)]
        else:
            named = [*zip(by_color, found, strict=True), *((Reference(s, cell=i), (i, c, s)) for i, c, s in found)]
            edits = {
                "make": [Edit("make", one, color=c) for one, (_, own, _) in named for c in COLORS if c != own],
                "remove": [Edit("remove", one) for one, _ in named],
                "move": [Edit("move", one, direction=way) for one, _ in named for way in DIRECTIONS],
            }[str(verb)]
        edits = [edit for edit in edits if split_of_edit(edit) == split and changes_of(edit, cells) is not None]
        if edits:
            return edits[int(rng.integers(len(edits)))]
    return None


@dataclass(frozen=True)
class EditScores:
    """
    How well B images follow their instructions, all in [0, 1].

    Attributes:
        done: (B,) share of the cells that were to change that are as asked.
        kept: (B,) share of the other cells that are as before.
    """

    done: ScoreArray
    kept: ScoreArray

    @property
    def reward(self) -> ScoreArray:
        """(B,) sqrt(done x kept): neither an untouched copy nor a new image scores."""
        return np.sqrt(self.done * self.kept)


def score_cells(targets: IntArray, asked: BoolArray, cells: IntArray) -> EditScores:
    """Score images' cells (B, 9) by what they should be (B, 9), and which of them were to change (B, 9)."""
    right = targets == cells
    share = [(right & mask).sum(1) / np.maximum(mask.sum(1), 1) for mask in (asked, ~asked)]
    return EditScores(*share)


def score_edits(edits: Sequence[Edit], sources: IntArray, cells: IntArray) -> EditScores:
    """
    Score B edited images.

    Args:
        edits: what was asked.
        sources: (B, 9) the scenes that were to be edited.
        cells: (B, 9) those of the edited images.

    Raises:
        ValueError: for an instruction that its scene can't follow.
    """
    return score_stories([[edit] for edit in edits], sources, cells)


def score_stories(stories: Sequence[Sequence[Edit]], sources: IntArray, cells: IntArray) -> EditScores:
    """
    Score B images after several edits in a row: `done` counts the cells that the last one was to change, `kept` all
    others, which are to be as the edits before have left them.

    Args:
        stories: for each image the instructions so far.
        sources: (B, 9) the scenes before the first.
        cells: (B, 9) those of the images after the last.
    """
    targets, asked, _ = follow_stories(stories, sources)
    return score_cells(targets, asked, cells)


def untouched_cells(stories: Sequence[Sequence[Edit]], sources: IntArray, cells: IntArray) -> ScoreArray:
    """Give the share (B,) of the cells that no instruction of a story was to change that are as in its source."""
    _, _, touched = follow_stories(stories, sources)
    return ((cells == sources) & ~touched).sum(1) / (~touched).sum(1)


def follow_stories(stories: Sequence[Sequence[Edit]], sources: IntArray) -> tuple[IntArray, BoolArray, BoolArray]:
    """
    Follow each story's instructions in its scene: the scenes (B, 9) that they lead to, the cells (B, 9) that the last
    one changes, and those that any does.

    Raises:
        ValueError: for an instruction that its scene can't follow.
    """
    targets, asked, touched = sources.copy(), *(np.zeros_like(sources, dtype=bool) for _ in range(2))
    for row, edits in enumerate(stories):
        for edit in edits:
            changes = changes_of(edit, targets[row])
            if changes is None:
                raise ValueError(
                    f"Row {row}: {edit.text!r} can't be followed in its source image, which does not show exactly one "
                    "such object, or no room for it. Take instructions and images from the same row of the dataset."
                )
            targets[row], asked[row] = apply_changes(targets[row], changes), False
            asked[row, list(changes)] = touched[row, list(changes)] = True
    return targets, asked, touched


def first_images(source_images: Sequence[Any]) -> list[Image.Image]:
    """Take the image of each row, which may come in a list of one."""
    return [row[0] if isinstance(row, (list, tuple)) else row for row in source_images]


def shapeworld_edit_reward(
    prompts: Sequence[str | list[dict[str, Any]]],
    completions: Sequence[Any],
    images: Sequence[Image.Image],
    source_images: Sequence[Any],
    **kwargs: Any,
) -> list[float]:
    """
    Give sqrt(done x kept) of each edited image, in [0, 1]: a TRL reward function.

    Args:
        prompts: B instructions, plain or conversational (the last user message counts).
        completions: not read, the image alone is scored.
        images: B images of 48 x 48 pixels, one per instruction.
        source_images: B images of 48 x 48 pixels that were to be edited, or lists of one.
    """
    stories = [[parse_edit(user_text(prompt))] for prompt in prompts]
    return _reward(stories, images, source_images)


def shapeworld_story_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    images: Sequence[Image.Image],
    source_images: Sequence[Any],
    turns: Sequence[Sequence[str]],
    round_index: Sequence[int] | None = None,
    **kwargs: Any,
) -> list[float]:
    """
    Give sqrt(done x kept) of each image of a story, in [0, 1]: a TRL reward function.

    Args:
        images: B images of 48 x 48 pixels.
        source_images: B images of 48 x 48 pixels that the stories begin with, or lists of one.
        turns: the instructions of each story, in order.
        round_index: for each image the number of the turn, from 0, that it comes after; None for the last.
    """
    if round_index is not None:
        turns = [story[: last + 1] for story, last in zip(turns, round_index, strict=True)]
    return _reward([[parse_edit(text) for text in story] for story in turns], images, source_images)


shapeworld_story_reward.every_round = True  # type: ignore[attr-defined]


def _reward(
    stories: Sequence[Sequence[Edit]], images: Sequence[Image.Image], source_images: Sequence[Any]
) -> list[float]:
    if not len(stories) == len(images) == len(source_images):
        raise ValueError(
            f"{len(images)} images and {len(source_images)} source images for {len(stories)} prompts: expected one of "
            "each per prompt"
        )
    sources, cells = (read_cells(images_to_array(some))[0] for some in (first_images(source_images), images))
    return score_stories(stories, sources, cells).reward.tolist()
