"""The common part of the demo's tasks with several images a row: a list of numbers, and a page of rows of images."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table

from ...reporting.pages import png_uri
from ...statistics import FloatArray, Interval, mean_interval
from .task import MeasuredT, Task


WHEN = ("before", "after")


class MeasuredRow(NamedTuple):
    """
    A number of a model: its key in the summary, what it is, and (N,) values, NaN where there is none.

    `clusters` are N labels of what is alike, where these are no rows of the task's own.
    """

    key: str
    title: str
    values: FloatArray
    clusters: list[str] | None = None


class Painted(NamedTuple):
    """The image of a round, the text before it, and its reward."""

    image: Image.Image
    text: str
    reward: float
    kept: bool = False


class Example(NamedTuple):
    """A row of the page: what a prompt shows to be edited, and its rounds before and after training."""

    title: str
    sources: list[Image.Image]
    before: list[Painted]
    after: list[Painted]


class RoundsTask(Task[MeasuredT]):
    """
    A task whose rows have several images.

    Attributes:
        title, lead: of the page.
        shown: which rows the page shows.
        main, what: key of the number that tells whether it worked, and what that is.
        led_by: keys of the numbers that the page leads with.
    """

    template = "rounds_report.html.jinja"
    title: ClassVar[str]
    lead: ClassVar[str]
    shown: ClassVar[str]
    main: ClassVar[str]
    what: ClassVar[str]
    led_by: ClassVar[tuple[str, ...]]

    @abstractmethod
    def rows(self, measured: MeasuredT) -> list[MeasuredRow]:
        """List the numbers of a model."""

    @abstractmethod
    def clusters(self, measured: MeasuredT) -> list[str]:
        """Name what rows are alike in: their prompts."""

    @abstractmethod
    def examples(self, before: MeasuredT, after: MeasuredT) -> list[Example]:
        """Choose the rows that the page shows."""

    def summary(self, before: MeasuredT, after: MeasuredT) -> dict[str, Any]:
        prompts = self.clusters(before)
        numbers: dict[str, Any] = {"n_eval": len(prompts)}
        for row, *sides in self.numbers(before, after):
            numbers |= {f"{row.key}_{when}": side._asdict() for when, side in zip(WHEN, sides, strict=True)}
        old, new = ({row.key: row.values for row in self.rows(side)}[self.main] for side in (before, after))
        return numbers | {"change": mean_interval(new - old, prompts)._asdict()}

    def numbers(self, before: MeasuredT, after: MeasuredT) -> list[tuple[MeasuredRow, Interval, Interval]]:
        """List what is measured, before and after; of what only some rows have, nothing that is one prompt's alone."""
        found = []
        for old, new in zip(self.rows(before), self.rows(after), strict=True):
            prompts = np.array(old.clusters or self.clusters(before))
            known = [~np.isnan(row.values) for row in (old, new)]
            if all(one.all() or len(set(prompts[one])) > 1 for one in known):
                first, second = (
                    mean_interval(row.values[one], prompts[one].tolist())
                    for row, one in zip((old, new), known, strict=True)
                )
                found.append((old, first, second))
        return found

    def table(self, before: MeasuredT, after: MeasuredT) -> Table:
        table = Table("", "before (95 % interval)", "after (95 % interval)")
        for row, old, new in self.numbers(before, after):
            table.add_row(row.title, str(old), str(new))
        return table

    def headline(self, summary: dict[str, Any]) -> str:
        sides = (f"{summary[f'{self.main}_{when}']['mean']:.3f}" for when in WHEN)
        return f"On held-out prompts, {self.what}: {' -> '.join(sides)}, {Interval(**summary['change'])} more"

    def page(self, before: MeasuredT, after: MeasuredT) -> dict[str, Any]:
        numbers = self.numbers(before, after)
        return {
            "title": self.title,
            "lead": self.lead,
            "what": self.what,
            "shown": self.shown,
            "numbers": [(row.title, old, new) for row, old, new in numbers],
            "led_by": [(row.title, old, new) for row, old, new in numbers if row.key in self.led_by],
            "examples": [
                {
                    "title": title,
                    "sources": [png_uri(image) for image in sources],
                    "sides": list(zip(WHEN, map(_shown, sides), strict=True)),
                }
                for title, sources, *sides in self.examples(before, after)
            ],
        }


def _shown(steps: Sequence[Painted]) -> list[dict[str, Any]]:
    return [step._asdict() | {"image": png_uri(step.image), "credit": None} for step in steps]


def write_rows(columns: Mapping[str, Sequence[Any]], file: Path) -> None:
    """Write columns as lines of JSON."""
    with file.open("w", encoding="utf-8") as out:
        for row in zip(*columns.values(), strict=True):
            out.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")
