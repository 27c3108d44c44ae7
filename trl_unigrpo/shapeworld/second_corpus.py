"""The corpus on which the base model learns to see: second looks at images, edits, and images from prompts as before.

As in [`corpus`], mistakes are made on purpose, so that training has something to repair: second looks overlook cells
and are too easily content, editors do something else than they were asked, painters harm what was to stay. Among
mistakes a model of this size does not learn to compare an image with a request; so it learns that first, without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image

from .corpus import NO_ERRORS, corpus_columns, draw_plans, painted_cells
from .dataset import check_split
from .edits import Edit, apply_changes, changes_of, draw_edit, draw_scene
from .grammar import sampling_weights
from .plan import format_plan
from .reflection import REFLECTION_TEMPLATE, Reflection, closest_scene
from .render import render_images
from .verifier import images_to_array, read_cells, score
from .world import (
    COLORS,
    EMPTY,
    MAX_OBJECTS,
    NUM_CELLS,
    NUM_CODES,
    PLACES,
    SHAPES,
    IntArray,
    PromptSpec,
    cell_colors,
    encode_specs,
)


_OBJECTS = [("", ""), *product(COLORS, SHAPES)]
"""Colour and shape of each code from 0."""


@dataclass(frozen=True)
class SecondRates:
    """
    Shares of rows and chances of mistakes, all in [0, 1].

    Attributes:
        refine, perfect, edit, describe: shares of second looks at images with faults, of those at images without, of
            edits, and of images that are described and copied; the rest paints from a prompt.
        caption: share of drawings that follow a prompt, which is read back from them without any instruction.
        own: share of second looks that see an image of the base model's own.
        overlooked: chance that a wrong cell is not named.
        content, doubtful: chance that a faulty image is kept, and that one without fault is not.
        harmed: chance that an object changes that was to stay.
        misread: chance that an edit does something else, or only half.
    """

    refine: float = 0.25
    perfect: float = 0.12
    edit: float = 0.2
    describe: float = 0.05
    caption: float = 0.0
    own: float = 0.6
    overlooked: float = 0.3
    content: float = 0.2
    doubtful: float = 0.15
    harmed: float = 0.03
    misread: float = 0.35


FAULTLESS = SecondRates(0.38, 0.22, 0.15, overlooked=0.0, content=0.0, doubtful=0.0, harmed=0.0, misread=0.0)
"""Mostly second looks, without mistakes: what a model learns to see from, before it learns mistakes."""

DESCRIBE = "the image is"
"""The instruction to say all that an image shows, in the words of a plan."""
MAX_FIXES = 3
"""The most cells that one second look names."""


@dataclass
class OwnImages:
    """
    Images that a model painted for prompts, P of them.

    Attributes:
        prompts: what was asked for.
        pixels: (P, 48, 48, 3) uint8.
    """

    prompts: list[str]
    pixels: NDArray[np.uint8]

    @classmethod
    def of(cls, prompts: Sequence[str], images: Sequence[Image.Image]) -> OwnImages:
        return cls(list(prompts), np.stack([np.asarray(image.convert("RGB")) for image in images]))


@dataclass
class _Row:
    """A row in the making: an image to look at, what is said, and the scene to paint; or a number of an own image."""

    prompt: str
    completion: str
    source: IntArray
    target: IntArray
    category: str
    own: int = -1
    own_target: bool = False


def spoiled(cells: IntArray, stays: NDArray[np.bool_], chance: float, rng: np.random.Generator) -> IntArray:
    """Change each object of a scene (9,) in the cells that were to stay with a chance: it vanishes or is another."""
    hit = stays & (cells > EMPTY) & (rng.random(NUM_CELLS) < chance)
    other = np.where(rng.random(NUM_CELLS) < 0.3, EMPTY, rng.integers(1, NUM_CODES, NUM_CELLS))
    return np.where(hit, other, np.maximum(cells, EMPTY))


def corrupted(cells: IntArray, rng: np.random.Generator) -> IntArray:
    """Make one or two cells of a scene (9,) wrong: another object, none, or one too many."""
    cells = cells.copy()
    for _ in range(int(rng.integers(1, 3))):
        objects, free = np.flatnonzero(cells > EMPTY), np.flatnonzero(cells == EMPTY)
        extra = rng.random() < 0.2 or not len(objects)
        cell = rng.choice(free if extra else objects)
        vanishes = not extra and len(objects) > 1 and rng.random() < 0.3
        # Another colour or another shape, seldom both.
        code = int(cells[cell])
        step = int(rng.integers(1, 5)) if rng.random() < 0.5 else 5 * int(rng.integers(1, 6))
        same_color = step < 5
        other = (
            1 + (code - 1) // 5 * 5 + (code - 1 + step) % 5 if same_color else 1 + (code - 1 + step) % (NUM_CODES - 1)
        )
        cells[cell] = EMPTY if vanishes else rng.integers(1, NUM_CODES) if extra else other
    return cells


def _second_look(spec: PromptSpec, cells: IntArray, rates: SecondRates, rng: np.random.Generator) -> Reflection:
    """Say what is wrong in a scene (9,), with the mistakes of the corpus."""
    target = closest_scene(spec, cells)
    wrong = np.flatnonzero(target != cells)
    keeps = rates.content if len(wrong) else 1 - rates.doubtful
    if rng.random() < keeps:
        return Reflection(_objects(cells), {})
    named = wrong[rng.random(len(wrong)) >= rates.overlooked]
    if not len(named):  # something that is right is said to be as it is, and painted again
        right = np.flatnonzero((target == cells) & (cells > EMPTY))
        named = rng.permutation(right if len(right) else np.flatnonzero(target == cells))[:1]
    named = np.sort(rng.permutation(named)[:MAX_FIXES])
    return Reflection(_objects(cells), {int(cell): int(target[cell]) for cell in named})


def _objects(cells: IntArray) -> dict[int, int]:
    """Give all cells of a scene (9,) that are not empty, as far as a look tells them."""
    filled = np.flatnonzero(cells != EMPTY)[:MAX_OBJECTS]
    return {int(cell): int(cells[cell]) for cell in filled}


def _look_again(
    prompt: str, spec: PromptSpec, cells: IntArray, rates: SecondRates, rng: np.random.Generator, own: int
) -> _Row:
    look = _second_look(spec, cells, rates, rng)
    stays = np.ones(NUM_CELLS, dtype=bool)
    stays[list(look.fixes)] = False
    target = spoiled(apply_changes(cells, dict(look.fixes)), stays, rates.harmed, rng) if look.fixes else cells
    text = REFLECTION_TEMPLATE.format(prompt=prompt)
    return _Row(text, look.text, cells, target, "refine", own, own_target=own >= 0 and not look.fixes)


def _misread(edit: Edit, changes: dict[int, int], rng: np.random.Generator) -> dict[int, int]:
    """Do something else than what was asked: another colour, a colour instead of nothing, or only half."""
    if len(changes) > 1:
        return dict([list(changes.items())[int(rng.integers(2))]])
    (cell, code), *_ = changes.items()
    if code == EMPTY:
        return {cell: int(rng.integers(1, NUM_CODES))}
    color = (int(cell_colors(np.array(code))) + int(rng.integers(1, len(COLORS)))) % len(COLORS)
    return {cell: 1 + color * 5 + (code - 1) % 5}


def _edited(rates: SecondRates, rng: np.random.Generator, split: str) -> _Row:
    cells, edit = draw_scene(rng), None
    while edit is None:
        cells = draw_scene(rng)
        edit = draw_edit(cells, split, rng)
    changes = changes_of(edit, cells)
    assert changes is not None
    if rng.random() < rates.misread:
        changes = _misread(edit, changes, rng)
    changes = dict(sorted(changes.items()))
    stays = np.ones(NUM_CELLS, dtype=bool)
    stays[list(changes)] = False
    said = Reflection({cell: int(cells[cell]) for cell in changes}, changes)
    return _Row(edit.text, said.text, cells, spoiled(apply_changes(cells, changes), stays, rates.harmed, rng), "edit")


def _described(rng: np.random.Generator) -> _Row:
    cells = draw_scene(rng, 1, MAX_OBJECTS)
    plan = [(*_OBJECTS[code], PLACES[cell]) for cell, code in enumerate(cells) if code > EMPTY]
    return _Row(DESCRIBE, format_plan(plan), cells, cells, "describe")


def second_corpus(
    num_rows: int, own: OwnImages, seed: int = 0, rates: SecondRates | None = None, split: str = "train"
) -> Dataset:
    """
    Make the corpus a dataset whose images are drawn when a row is read.

    Args:
        num_rows: number of examples.
        own: images of the base model's own, for prompts of the same split.
        seed: fixes rows and mistakes.
        rates: of kinds of rows, and of mistakes. `None`: the defaults.
        split: of prompts and instructions. Only "train" keeps the other splits unseen.

    Returns:
        Columns `prompt` (str; [] where there are no words), `completion`, `category` (str), `image` and
        `source_image` (PIL; None where there is none).
    """
    rates = rates or SecondRates()
    rng = np.random.default_rng([seed, 2])
    shares, captions = [rates.refine, rates.perfect, rates.edit, rates.describe], round(num_rows * rates.caption)
    paint, refine, perfect, edit, describe = rng.multinomial(num_rows - captions, [1 - sum(shares), *shares])
    rows = _second_looks(refine, perfect, own, rates, rng, split)
    rows += [_edited(rates, rng, split) for _ in range(edit)]
    rows += [_described(rng) for _ in range(describe)]
    drawn = _drawn(captions, rng, split) if captions else []
    rows += [_Row("", text, scene, scene, "caption") for text, _, scene in drawn]
    first = corpus_columns(paint, seed + 1, split=split)
    none = np.full(NUM_CELLS, -1)
    columns: dict[str, list[Any]] = {
        "prompt": [*first["prompt"], *(row.prompt for row in rows)],
        "completion": [*first["completion"], *(row.completion for row in rows)],
        "category": [*first["category"], *(row.category for row in rows)],
        "cells": [*first["cells"], *(row.target.astype(np.int8) for row in rows)],
        "source": [*[none.astype(np.int8)] * paint, *(row.source.astype(np.int8) for row in rows)],
        "seen": [*[0] * paint, *[1] * len(rows)],
        "own": [*[-1] * paint, *(row.own for row in rows)],
        "own_target": [*[False] * paint, *(row.own_target for row in rows)],
    }
    order = rng.permutation(num_rows)
    columns = {name: [values[i] for i in order] for name, values in columns.items()}
    return Dataset.from_dict(columns).with_transform(_Drawing(own))


def _second_looks(
    refine: int, perfect: int, own: OwnImages, rates: SecondRates, rng: np.random.Generator, split: str
) -> list[_Row]:
    """Look again at own images and at drawings, with faults and without."""
    prompts = check_split(split)
    own_cells, _ = read_cells(images_to_array([Image.fromarray(image) for image in own.pixels]))
    own_specs = [prompts[prompt] for prompt in own.prompts]
    strict = score(own_specs, own_cells).strict == 1
    rows = []
    for number, right in ((refine, False), (perfect, True)):
        known = np.flatnonzero(strict == right)
        from_own = min(number, round(number * rates.own)) if len(known) else 0
        for i in rng.choice(known, from_own) if from_own else ():
            rows.append(_look_again(own.prompts[i], own_specs[i], own_cells[i], rates, rng, int(i)))
        for text, spec, scene in _drawn(number - from_own, rng, split):
            shown = scene if right else corrupted(scene, rng)
            rows.append(_look_again(text, spec, shown, rates, rng, -1))
    return rows


def _drawn(number: int, rng: np.random.Generator, split: str) -> list[tuple[str, PromptSpec, IntArray]]:
    """Draw prompts, and for each a scene (9,) that follows it."""
    prompts = check_split(split)
    texts, specs = list(prompts), list(prompts.values())
    drawn = rng.choice(len(texts), number, p=sampling_weights(specs))
    scenes = painted_cells(draw_plans(encode_specs([specs[i] for i in drawn]), rng), NO_ERRORS, rng)
    return [(texts[i], specs[i], scene) for i, scene in zip(drawn, scenes, strict=True)]


@dataclass
class _Drawing:
    """Draws the images of a batch of rows, or takes them from the model's own."""

    own: OwnImages

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = ("prompt", "completion", "category")
        columns: dict[str, list[Any]] = {name: batch[name] for name in texts if name in batch}
        if "prompt" in columns:
            columns["prompt"] = [prompt or [] for prompt in columns["prompt"]]
        if "cells" not in batch:
            return columns
        target, source = (render_images(np.maximum(np.array(batch[name]), 0)) for name in ("cells", "source"))
        own = [None if i < 0 else Image.fromarray(self.own.pixels[i]) for i in batch["own"]]
        columns["image"] = [
            mine if taken and mine else drawn
            for mine, taken, drawn in zip(own, batch["own_target"], target, strict=True)
        ]
        columns["source_image"] = [
            (mine or drawn) if seen else None for mine, drawn, seen in zip(own, source, batch["seen"], strict=True)
        ]
        return columns
