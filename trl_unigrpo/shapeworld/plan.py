"""Plans: the thinking text of ShapeWorld, as "<think> red circle top-left blue square center </think>"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .verifier import ScoreArray, score
from .world import (
    COLORS,
    EMPTY,
    MAX_OBJECTS,
    NUM_CELLS,
    PLACES,
    SHAPES,
    THINK_END,
    THINK_START,
    IntArray,
    PromptSpec,
    cell_code,
)


PlannedObject = tuple[str, str, str]
"""(color, shape, place), all words of the vocabulary."""


def format_plan(plan: Sequence[PlannedObject]) -> str:
    """Write the thinking text of a plan."""
    return " ".join([THINK_START, *(word for planned in plan for word in planned), THINK_END])


def parse_plan(text: str) -> list[PlannedObject] | None:
    """Read a plan, the inverse of `format_plan`; `None` for no plan, or one with two objects in one place.

    At most `MAX_OBJECTS` objects make a plan; none at all (an empty thought) are one too.
    """
    words = text.split()
    if len(words) < 2 or words[0] != THINK_START or words[-1] != THINK_END or len(words) % 3 != 2:
        return None
    body = words[1:-1]
    plan = list(zip(body[0::3], body[1::3], body[2::3], strict=True))
    valid = all(color in COLORS and shape in SHAPES and place in PLACES for color, shape, place in plan)
    distinct = len({place for _, _, place in plan}) == len(plan)
    return plan if valid and distinct and len(plan) <= MAX_OBJECTS else None


def plan_cells(plan: Sequence[PlannedObject]) -> IntArray:
    """Draw the plan: the cells (9,) of the image that it describes."""
    cells = np.full(NUM_CELLS, EMPTY, dtype=np.int64)
    for color, shape, place in plan:
        cells[PLACES.index(place)] = cell_code(color, shape)
    return cells


def score_plans(specs: Sequence[PromptSpec], completions: Sequence[str]) -> ScoreArray:
    """Score images painted exactly as planned, (B,) in [0, 1]; 0 for a text that is no plan."""
    # No plan is scored as an empty image, which passes no check of any prompt.
    plans = [plan_cells(parse_plan(text) or []) for text in completions]
    return score(specs, np.array(plans, dtype=np.int64).reshape(-1, NUM_CELLS)).score


def plan_faithfulness(completions: Sequence[str], cells: IntArray) -> tuple[ScoreArray, ScoreArray]:
    """Compare B plans with the cells (B, 9) of their images.

    Returns:
        (B,) 1 where the image is exactly the planned one, else 0; and (B,) the share of the planned objects that
        were painted in their place, colour and shape. Both are NaN where there is no plan to compare with.
    """
    exact, objects = np.full(len(cells), np.nan), np.full(len(cells), np.nan)
    for row, text in enumerate(completions):
        plan = parse_plan(text)
        if plan:
            planned = plan_cells(plan)
            exact[row] = float((planned == cells[row]).all())
            objects[row] = float((planned == cells[row])[planned > 0].mean())
    return exact, objects
