"""The display of the command while it works, and the grid as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from .jobs import Job
from .systems import SYSTEMS


class Display:
    """Lines for what ends and, on a terminal, bars for what runs. Use it as a context."""

    def __init__(self, console: Console, output: Path, total: int, rollouts: int):
        """`rollouts` are those of a run of the usual length."""
        self.console, self.output, self.total, self.rollouts = console, output, total, rollouts
        self.done = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.all = self.progress.add_task("runs", total=total, note="")
        self.bars: dict[Job, TaskID] = {}

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def started(self, job: Job) -> None:
        self.bars[job] = self.progress.add_task(str(job), total=self.rollouts * job.length, note="")

    def finished(self, job: Job) -> None:
        self._ended(job)
        run = json.loads((job.folder(self.output) / "run.json").read_text(encoding="utf-8"))
        scores = [
            f"{mode} {fmean(found['learned']):.3f} (rule {fmean(found['rule']):.3f})"
            for mode, found in run["evaluations"].items()
        ]
        self._say(f"{job}: {', '.join(scores)}, {run['seconds']:.0f} s ({self.done} of {self.total})")

    def failed(self, job: Job, why: str) -> None:
        self._ended(job)
        self._say(f"{job} failed ({self.done} of {self.total}): {why}")

    def tick(self, running: Sequence[Job]) -> None:
        for job in running if self.console.is_terminal else ():
            row = last_row(job.folder(self.output) / "history.jsonl")
            note = f"reward {row['reward']:.3f}" if "reward" in row else ""
            self.progress.update(self.bars[job], completed=int(row.get("rollouts", 0)), note=note)

    def _ended(self, job: Job) -> None:
        self.done += 1
        self.progress.update(self.all, completed=self.done)
        if job in self.bars:
            self.progress.remove_task(self.bars.pop(job))

    def _say(self, line: str) -> None:
        # soft_wrap: a log line stays one line in a file.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def last_row(file: Path) -> dict[str, float]:
    """Read the last whole line of a history; {} where there is none yet."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(lines[-1]) if lines else {}


def duration(seconds: float) -> str:
    """Write seconds as "2 h 5 min" or "40 min"."""
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def grid_table(jobs: Sequence[Job], output: Path) -> Table:
    """Tabulate the systems: which of each one's runs are done, and which are left."""
    table = Table("system", "title", "for", "done", "left")
    for name in dict.fromkeys(job.system for job in jobs):
        own = [job for job in jobs if job.system == name]
        labels = {job: str(job.seed if job.candidate is None else job.candidate) for job in own}
        done = " ".join(labels[job] for job in own if job.finished(output))
        left = " ".join(labels[job] for job in own if not job.finished(output))
        table.add_row(name, SYSTEMS[name].title, SYSTEMS[name].group, done, left)
    return table
