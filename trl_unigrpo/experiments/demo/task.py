"""A task of the demo: what is trained, on which rows, how it is measured, and the page about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from datasets import Dataset
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ...reporting.description import shown_settings
from ...reporting.pages import Curve, Panel, render_page, write_page
from ...reporting.run_files import NoRunError, read_run
from ...reporting.run_page import trust


if TYPE_CHECKING:
    from ...trainers.unigrpo_config import UniGRPOConfig

MeasuredT = TypeVar("MeasuredT")
SMOOTH = 10  # rollouts in the moving mean of the curves


class Task(ABC, Generic[MeasuredT]):
    """
    One task of the demo. `MeasuredT` is a model, measured on the held-out rows.

    Attributes:
        rollouts, num_rows: how many there are by default, of 192 trajectories each, and held-out rows.
        seeing: True for a base model that sees images.
        reward: the reward function of the training.
        template: of the page.
        panels: metrics that the page draws: name -> title.
    """

    rollouts: int
    num_rows: ClassVar[int]
    seeing: ClassVar[bool] = True
    reward: Callable[..., Any]
    template: ClassVar[str]
    panels: ClassVar[dict[str, str]]

    @abstractmethod
    def settings(self, rollouts: int) -> dict[str, Any]:
        """Give the training's settings, for [`UniGRPOConfig`]."""

    @abstractmethod
    def dataset(self, split: str, num_rows: int | None, seed: int) -> Dataset:
        """Draw rows of a split; None for as many as training wants."""

    @abstractmethod
    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> MeasuredT:
        """Score a model on held-out rows; the same rows and noise each time."""

    @abstractmethod
    def save(self, measured: MeasuredT, file: Path) -> None:
        """Write a line of JSON for each row."""

    @abstractmethod
    def summary(self, before: MeasuredT, after: MeasuredT) -> dict[str, Any]:
        """Compute the numbers of `summary.json`."""

    @abstractmethod
    def table(self, before: MeasuredT, after: MeasuredT) -> Table:
        """Tabulate what changed, for the console."""

    @abstractmethod
    def page(self, before: MeasuredT, after: MeasuredT) -> dict[str, Any]:
        """Give what the page shows beside the summary, the curves and the settings."""

    @abstractmethod
    def headline(self, summary: dict[str, Any]) -> str:
        """Say in one line what changed."""

    def write_report(
        self,
        file: Path,
        before: MeasuredT,
        after: MeasuredT,
        history: Sequence[dict[str, float]],
        summary: dict[str, Any],
        args: UniGRPOConfig,
    ) -> None:
        """Write the page. It needs no other file and no network; beside the run's gallery, it names its alarms."""
        try:
            run = read_run(file.parent)
        except NoRunError:
            run = None
        html = render_page(
            self.template,
            summary=summary,
            panels=curves(history, self.panels),
            settings=shown_settings(args),
            trust=trust(run) if run is not None else None,
            gallery="gallery.html" if (file.parent / "gallery.html").is_file() else None,
            **self.page(before, after),
        )
        write_page(file, html)


def curves(history: Sequence[dict[str, float]], panels: dict[str, str]) -> list[Panel]:
    """Draw metrics of the training per rollout, one panel for each that there is."""
    found = []
    for key, title in panels.items():
        if values := [row[key] for row in history if key in row]:
            found.append(Panel(title, [Curve("", range(1, len(values) + 1), values, SMOOTH)], "Over rollouts."))
    return found
