"""The runs that there are to do: where they lie, which are done, and how long the others will take."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .systems import (
    SEARCH_SEED,
    SYSTEMS,
    Settings,
    System,
)


@dataclass(frozen=True)
class Job:
    """One run: a system with a seed, or one candidate of the search for a system."""

    system: str
    seed: int
    candidate: int | None = None

    def __str__(self) -> str:
        return f"{self.system} seed {self.seed}" if self.candidate is None else f"{self.system} #{self.candidate}"

    @property
    def length(self) -> int:
        """Say how many times as long as the others it is."""
        return SYSTEMS[self.system].length

    @property
    def start(self) -> Job | None:
        """The run whose model this one goes on with; None for the base model."""
        start = SYSTEMS[self.system].start
        return None if start is None else Job(start, self.seed)

    def folder(self, output: Path) -> Path:
        if self.candidate is not None:
            return output / "search" / self.system / str(self.candidate)
        return output / self.system / f"seed-{self.seed}"

    def finished(self, output: Path) -> bool:
        return (self.folder(output) / "run.json").is_file()


def grid_jobs(systems: Iterable[System], seeds: Sequence[int] | None = None) -> list[Job]:
    """
    List the runs in the order in which to do them: one seed after the other, each run after its start.

    Args:
        seeds: of all systems that are trained; each system's own without them.
    """
    wanted = {of.name: of.seeds if seeds is None or of.method == "none" else tuple(seeds) for of in systems}
    jobs: dict[Job, None] = {}
    for seed in dict.fromkeys(seed for of in wanted.values() for seed in of):
        for system in (system for system, of in wanted.items() if seed in of):
            job = Job(system, seed)
            if job.start is not None:
                jobs[job.start] = None
            jobs[job] = None
    return list(jobs)


def search_jobs(system: System) -> list[Job]:
    """List one run per candidate."""
    return [Job(system.name, SEARCH_SEED, index) for index in range(len(system.candidates))]


def check_same(job: Job, output: Path, settings: Settings) -> None:
    """Raise a ValueError where the folder of a finished run holds one with other settings than these."""
    file = job.folder(output) / "run.json"
    found = json.loads(file.read_text(encoding="utf-8"))["settings"]
    differences = [
        f"{name}={found.get(name)} there, {settings.get(name)} now"
        for name in sorted({*found, *settings})
        if found.get(name) != settings.get(name)
    ]
    if differences:
        raise ValueError(
            f"{file} is of a run with other settings ({'; '.join(differences)}). Choose another --output-dir, or "
            "delete that folder to make the run anew."
        )


def write_once(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON; a ValueError where the file is there and holds something else."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    elif json.loads(file.read_text(encoding="utf-8")) != content:
        raise ValueError(
            f"{file} is of runs on other prompts than these: --quick and --rollouts need folders of their own. Choose "
            "another --output-dir."
        )


def seconds_left(jobs: Sequence[Job], output: Path, number: int) -> float | None:
    """
    Guess how long the jobs that are left will take, `number` at a time; None as long as no run has finished.

    A run takes as long as those of its system took on average, or else, for its length, of its method, or else of all.
    """
    took: dict[str, list[float]] = {}
    for file in [*output.glob("*/seed-*/run.json"), *output.glob("search/*/*/run.json")]:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["system"] not in SYSTEMS:
            continue
        system = SYSTEMS[found["system"]]
        for key in (system.name, f"method {system.method}", *(["all"] if system.method != "none" else [])):
            took.setdefault(key, []).append(found["seconds"] / system.length)
    total = 0.0
    for job in jobs:
        if job.finished(output):
            continue
        keys = (job.system, f"method {SYSTEMS[job.system].method}", "all")
        mean = next((statistics.mean(took[key]) for key in keys if key in took), None)
        if mean is None:
            return None
        total += mean * job.length
    return total / number
