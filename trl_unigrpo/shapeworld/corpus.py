"""The corpus on which ShapeWorld's base model is pre-trained: prompts, plans, images, and deliberate mistakes.

A base model must leave its two experts something to learn. So the corpus is written by a thinker that miscounts and
swaps sides and colours, and drawn by a painter that mistakes triangles for squares. The mistakes are made once, from
the seed; nothing outside this file knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from ..statistics import BoolArray
from .dataset import check_split
from .grammar import sampling_weights
from .render import render_images
from .world import (
    COLORS,
    EMPTY,
    MAX_GROUPS,
    MAX_OBJECTS,
    NUM_CELLS,
    PLACES,
    RELATION_TABLE,
    SHAPES,
    THINK_END,
    THINK_START,
    IntArray,
    PromptSpec,
    SpecArrays,
    encode_specs,
)


@dataclass(frozen=True)
class ErrorRates:
    """Chances in [0, 1] that the corpus is wrong.

    The first group are mistakes of the plan, per plan to which they can happen; `miscount` has one chance for each
    number of objects from two to five. The second group are mistakes of the painter, per planned object of that kind
    (`extra`: per image); a painter never drops the only object.
    """

    miscount: tuple[float, float, float, float] = (0.16, 0.28, 0.36, 0.40)
    miscount_sum: float = 0.12
    """Added to `miscount` where the number is a sum or a difference."""
    swapped_sides: float = 0.36
    swapped_colors: float = 0.28
    forgotten_second: float = 0.24
    misplaced: float = 0.24
    wrong_shape: float = 0.12
    wrong_thing_color: float = 0.40
    wrong_feature_shape: float = 0.40
    not_opposite: float = 0.40

    triangle_as_square: float = 0.288
    ring_as_circle: float = 0.288
    yellow_as_green: float = 0.24
    random_color: float = 0.0576
    dropped: float = 0.0576
    extra: float = 0.1152

    def scaled(self, plan: float = 1.0, painter: float = 1.0) -> ErrorRates:
        """Make the same mistakes more or less often; chances stay at most 1."""
        rates: dict[str, Any] = {}
        for field in fields(self):
            factor, value = painter if field.name in _PAINTER_ERRORS else plan, getattr(self, field.name)
            scaled = np.minimum(np.multiply(value, factor), 1.0)
            rates[field.name] = tuple(scaled.tolist()) if isinstance(value, tuple) else float(scaled)
        return ErrorRates(**rates)


_PAINTER_ERRORS = {"triangle_as_square", "ring_as_circle", "yellow_as_green", "random_color", "dropped", "extra"}

NO_ERRORS = ErrorRates().scaled(0.0, 0.0)

_SLOTS = 1 + MAX_OBJECTS
_TRIANGLE, _SQUARE = SHAPES.index("triangle"), SHAPES.index("square")
_RING, _CIRCLE = SHAPES.index("ring"), SHAPES.index("circle")
_YELLOW, _GREEN = COLORS.index("yellow"), COLORS.index("green")


@dataclass(frozen=True)
class Plans:
    """N plans as arrays (N, 6). Slots 1 to 5 hold the objects in the prompt's order; slot 0 is for one too many.

    Args:
        color: indexes `COLORS`.
        shape: indexes `SHAPES`.
        cell: 0 to 8.
        present: the slots that hold an object. The other three are meaningless where this is false.
    """

    color: IntArray
    shape: IntArray
    cell: IntArray
    present: BoolArray


def _pick(mask: BoolArray, rng: np.random.Generator) -> IntArray:
    """Pick one random true column of each row of (N, M); an arbitrary one where there is none."""
    return np.where(mask, rng.random(mask.shape), -1.0).argmax(1)


def draw_plans(specs: SpecArrays, rng: np.random.Generator) -> Plans:
    """Draw one faultless plan for each of N specs. Whatever the prompt leaves open is drawn uniformly."""
    number = len(specs)
    rows = np.arange(number)
    ends = specs.count.cumsum(1)
    slot = np.arange(MAX_OBJECTS)
    group = np.minimum((slot >= ends[:, :, None]).sum(1), MAX_GROUPS - 1)
    present = slot < ends[:, -1:]
    color, shape = np.take_along_axis(specs.color, group, 1), np.take_along_axis(specs.shape, group, 1)
    color = np.where(color < 0, rng.integers(0, len(COLORS), color.shape), color)
    shape = np.where(shape < 0, rng.integers(0, len(SHAPES), shape.shape), shape)

    region = specs.region[rows[:, None], group]  # (N, 5, 9)
    for relation, table in enumerate(RELATION_TABLE):
        related = np.flatnonzero(specs.relation == relation)
        pairs = np.argwhere(table)[rng.integers(0, table.sum(), len(related))]
        region[related, :2] = np.arange(NUM_CELLS) == pairs[:, :, None]
    cell, free = np.zeros_like(color), np.ones((number, NUM_CELLS), dtype=bool)
    # The most restricted objects come first, so that no other has taken their only cell.
    order = np.argsort(np.where(present, region.sum(2), NUM_CELLS + 1), axis=1, kind="stable")
    for slots in order.T:
        chosen = _pick(region[rows, slots] & free, rng)
        cell[rows, slots] = chosen
        free[rows, chosen] &= ~present[rows, slots]

    def with_spare(values: NDArray[Any]) -> NDArray[Any]:
        return np.pad(values, ((0, 0), (1, 0)))

    return Plans(with_spare(color), with_spare(shape), with_spare(cell), with_spare(present))


def _free_cells(plans: Plans) -> BoolArray:
    """Find the cells without an object, (N, 9)."""
    free = np.ones((len(plans.cell), NUM_CELLS), dtype=bool)
    rows, slots = np.nonzero(plans.present)
    free[rows, plans.cell[rows, slots]] = False
    return free


def spoil_plans(
    plans: Plans, specs: SpecArrays, prompts: list[PromptSpec], rates: ErrorRates, rng: np.random.Generator
) -> Plans:
    """Make the thinker's mistakes. `prompts` and `specs` are the same N prompts."""
    color, shape, cell, present = plans.color.copy(), plans.shape.copy(), plans.cell.copy(), plans.present.copy()
    category = np.array([spec.category for spec in prompts])
    family = np.array([spec.family for spec in prompts])
    number = present.sum(1)

    def hit(applies: BoolArray, rate: float | NDArray[np.float64]) -> IntArray:
        return np.flatnonzero(applies & (rng.random(len(applies)) < rate))

    def other(values: IntArray, number_of_values: int) -> IntArray:
        return (values + rng.integers(1, number_of_values, len(values))) % number_of_values

    rows = hit(category == "position", rates.swapped_sides)
    cell[rows, 1], cell[rows, 2] = cell[rows, 2], cell[rows, 1]
    rows = hit(category == "color_attr", rates.swapped_colors)
    color[rows, 1], color[rows, 2] = color[rows, 2], color[rows, 1]
    rows = hit(category == "single_object", rates.wrong_shape)
    shape[rows, 1] = other(shape[rows, 1], len(SHAPES))
    rows = hit(np.isin(family, ("color_of", "colored_pair", "colored_feature")), rates.wrong_thing_color)
    color[rows, 1] = other(color[rows, 1], len(COLORS))
    rows = hit(np.isin(family, ("feature", "colored_feature")), rates.wrong_feature_shape)
    shape[rows, 1] = other(shape[rows, 1], len(SHAPES))
    rows = hit(family == "opposite", rates.not_opposite)
    cell[rows, 1] = NUM_CELLS - 1 - cell[rows, 1]

    # A restricted object goes to a free cell outside its region. Prompts restrict their first group, or the second.
    restricted: BoolArray = np.logical_not(specs.region.all(2))
    rows = hit(restricted.any(1) & (category != "reasoning"), rates.misplaced)
    group = restricted[rows].argmax(1)
    slot = np.where(group == 0, 1, 1 + specs.count[rows, 0])
    cell[rows, slot] = _pick((_free_cells(plans)[rows]) & ~specs.region[rows, group], rng)

    rows = hit(category == "two_object", rates.forgotten_second)
    present[rows, 2] = False

    sums = np.isin(family, ("arithmetic", "arithmetic_groups"))
    chance = np.array([0.0, 0.0, *rates.miscount])[number] + rates.miscount_sum * sums
    rows = hit(np.isin(category, ("counting", "groups")) | sums, chance)
    too_many = (rng.random(len(rows)) >= 0.7) & (number[rows] < MAX_OBJECTS)
    more, fewer = rows[too_many], rows[~too_many]
    color[more, 0], shape[more, 0], present[more, 0] = color[more, 1], shape[more, 1], True
    cell[more, 0] = _pick(_free_cells(Plans(color, shape, cell, plans.present))[more], rng)
    present[fewer, _pick(present[fewer], rng)] = False
    return Plans(color, shape, cell, present)


def painted_cells(plans: Plans, rates: ErrorRates, rng: np.random.Generator) -> IntArray:
    """Paint N plans as cells (N, 9), with the painter's mistakes."""
    color, shape, present = plans.color, plans.shape, plans.present

    def hit(rate: float) -> BoolArray:
        return rng.random(color.shape) < rate

    new_shape = np.where((shape == _TRIANGLE) & hit(rates.triangle_as_square), _SQUARE, shape)
    new_shape = np.where((shape == _RING) & hit(rates.ring_as_circle), _CIRCLE, new_shape)
    new_color = np.where(hit(rates.random_color), rng.integers(0, len(COLORS), color.shape), color)
    new_color = np.where((color == _YELLOW) & hit(rates.yellow_as_green), _GREEN, new_color)
    drawn = present & ~(hit(rates.dropped) & (present.sum(1, keepdims=True) > 1))

    cells = np.full((len(color), NUM_CELLS), EMPTY, dtype=np.int64)
    rows, slots = np.nonzero(drawn)
    cells[rows, plans.cell[rows, slots]] = 1 + new_color[rows, slots] * len(SHAPES) + new_shape[rows, slots]
    rows = np.flatnonzero(rng.random(len(color)) < rates.extra)
    cells[rows, _pick(_free_cells(plans)[rows], rng)] = rng.integers(1, 1 + len(COLORS) * len(SHAPES), len(rows))
    return cells


_OBJECT_WORDS = [f"{color} {shape} {place}" for color in COLORS for shape in SHAPES for place in PLACES]


def plan_texts(plans: Plans) -> list[str]:
    """Write the thinking text of each of N plans."""
    index = (plans.color * len(SHAPES) + plans.shape) * NUM_CELLS + plans.cell
    marked = np.where(plans.present, index, -1).tolist()
    return [" ".join([THINK_START, *(_OBJECT_WORDS[i] for i in row if i >= 0), THINK_END]) for row in marked]


def corpus_columns(
    num_rows: int,
    seed: int = 0,
    rates: ErrorRates | None = None,
    no_thinking_share: float = 0.2,
    split: str = "train",
) -> dict[str, Any]:
    """Write the corpus as columns: `prompt`, `completion` ("" without thinking), `cells` (num_rows, 9), `category`.

    Prompts are drawn as `grammar.sampling_weights` says: categories evenly. About 10 microseconds a row.
    """
    rates = rates or ErrorRates()
    rng = np.random.default_rng(seed)
    prompts = check_split(split)
    texts, specs = list(prompts), list(prompts.values())
    rows = rng.choice(len(texts), num_rows, p=sampling_weights(specs))
    drawn, arrays = [specs[i] for i in rows], encode_specs(specs).take(rows)
    plans = spoil_plans(draw_plans(arrays, rng), arrays, drawn, rates, rng)
    thinks = rng.random(num_rows) >= no_thinking_share
    return {
        "prompt": [texts[i] for i in rows],
        "completion": [text if think else "" for text, think in zip(plan_texts(plans), thinks, strict=True)],
        "cells": painted_cells(plans, rates, rng).astype(np.int8),
        "category": [spec.category for spec in drawn],
    }


def render_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Replace the column `cells` of a batch by `image`, images of 48 x 48 pixels."""
    columns = {name: values for name, values in batch.items() if name != "cells"}
    if "cells" in batch:
        columns["image"] = render_images(np.array(batch["cells"], dtype=np.int64))
    return columns


def pretraining_corpus(
    num_rows: int,
    seed: int = 0,
    rates: ErrorRates | None = None,
    no_thinking_share: float = 0.2,
    split: str = "train",
    transform: Callable[[dict[str, list[Any]]], dict[str, list[Any]]] = render_batch,
) -> Dataset:
    """Make the corpus a dataset whose images are drawn when a row is read.

    Args:
        num_rows: number of examples; a prompt comes many times, with another plan each time.
        seed: fixes prompts, plans and mistakes.
        rates: of the mistakes. `None`: the defaults of `ErrorRates`.
        no_thinking_share: share of rows in [0, 1] whose `completion` is "" (the image follows the prompt directly).
        split: the prompts' split. Only "train" keeps the other splits unseen.
        transform: turns a batch of columns with `cells` into what the trainer reads.

    Returns:
        Columns `prompt` (str), `completion` (str), `category` (str), `image` (PIL), the format of TRL's
        prompt-completion datasets with an image.
    """
    columns = corpus_columns(num_rows, seed, rates, no_thinking_share, split)
    columns["cells"] = list(columns["cells"])
    return Dataset.from_dict(columns).with_transform(transform)
