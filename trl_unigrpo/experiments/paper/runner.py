"""`trl-unigrpo paper`: the search and the grid, run after run, and the page at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

from rich.console import Console

from .jobs import (
    Job,
    check_same,
    grid_jobs,
    search_jobs,
    seconds_left,
    write_once,
)
from .processes import LOCKS, run_all
from .progress import Display, duration, grid_table
from .systems import (
    CHOSEN,
    FULL,
    QUICK,
    QUICK_SYSTEMS,
    SEARCH,
    SYSTEMS,
    Scale,
    System,
    select,
)


BYTES_PER_RUN = 2**22
"""A run's folder, a model included."""
IGNORED = f"/{LOCKS}/\nlog.txt\nmodel/\n*.part\n"
"""Parts of the output folder that are not worth keeping in git."""


@dataclass(frozen=True)
class PaperOptions:
    """
    The options that the command was given.

    Attributes:
        output: the folder of the runs.
        chosen: the file of the search's choice.
        jobs: runs at a time.
        seeds: of all systems; None for each system's own.
        page: the Markdown file to write; None for paper.md in the output folder.
        generations: of a run, instead of the scale's own.
        from_results: only write the page again, from the output folder's results.json.
    """

    output: Path
    chosen: Path
    jobs: int
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    quick: bool = False
    search: bool = False
    page: Path | None = None
    generations: int | None = None
    from_results: bool = False

    @property
    def scale(self) -> Scale:
        scale = SEARCH if self.search else QUICK if self.quick else FULL
        return Scale(self.generations or scale.generations, scale.num_prompts, scale.split)

    @property
    def systems(self) -> list[System]:
        """The systems that are asked for, those to be searched with `search`."""
        if self.search:
            found = [SYSTEMS[name] for name in SYSTEMS if SYSTEMS[name].candidates]
            return [system for system in found if not self.only or system in select(self.only)]
        return select(self.only or (QUICK_SYSTEMS if self.quick else ()))

    @property
    def all_jobs(self) -> list[Job]:
        if self.search:
            return [job for system in self.systems for job in search_jobs(system)]
        return grid_jobs(self.systems, self.seeds)


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def show_grid(options: PaperOptions, console: Console) -> None:
    """Print the grid, with what is done, what is left and about how long it will take."""
    jobs = options.all_jobs
    console.print(grid_table(jobs, options.output))
    done = sum(job.finished(options.output) for job in jobs)
    left = seconds_left(jobs, options.output, options.jobs)
    time = "nothing is left to do"
    if done < len(jobs):
        time = "no run has finished yet to tell the time" if left is None else f"about {duration(left)} left"
    console.print(f"{done} of {len(jobs)} runs are done; {time}, with {options.jobs} at a time.")


def run_paper(options: PaperOptions, console: Console) -> int:
    """
    Do all runs that are not done, and write the choice (with `search`) or the page, which `from_results` does alone.

    Returns:
        The exit code: 0, 1 where a run failed, 128 + its number where a signal ended the command.

    Raises:
        ValueError, OSError: for what is wrong with the settings, before any run starts.
    """
    if options.from_results:
        return rewrite_page(options, console)
    if options.search and (options.quick or options.generations) and options.chosen.resolve() == CHOSEN.resolve():
        raise ValueError(
            "The choice that is shipped is made at full length: leave out --quick and --rollouts, or name another "
            "file for it with --chosen."
        )
    if not options.all_jobs:
        raise ValueError(
            f"--only {','.join(options.only)}: nothing is searched for these systems. Those with a search are "
            f"{', '.join(name for name, system in SYSTEMS.items() if system.candidates)}."
        )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / ".gitignore").write_text(IGNORED, encoding="utf-8")
    return search(options, console) if options.search else run_grid(options, console)


def rewrite_page(options: PaperOptions, console: Console) -> int:
    """Write the page again from results.json, for which no run is needed; returns the exit code 0."""
    from .page import write_paper_page

    console.print(f"Page: {write_paper_page(options.output, options.page)}")
    return 0


def prepare_runs(options: PaperOptions, jobs: Sequence[Job]) -> None:
    """Check the settings of all jobs and the disk, and write their prompts."""
    # Modules that import the trainers are imported where they are needed, here and below: `--list` needs none.
    from ...shapeworld import shapeworld_dataset
    from ...shapeworld.evaluate import EVALUATION_SEED
    from .chosen import load_chosen
    from .training import run_settings, trainer_arguments

    chosen = load_chosen(options.chosen)
    for job in jobs:
        system = SYSTEMS[job.system]
        settings = run_settings(system, chosen, options.scale, job.candidate)
        if settings:
            trainer_arguments(system, settings, str(job.folder(options.output)), job.seed)
        if job.finished(options.output):
            check_same(job, options.output, settings)
    renew_starts(jobs, options.output)
    scale = options.scale
    dataset = shapeworld_dataset(scale.split, scale.num_prompts, seed=EVALUATION_SEED)
    file = options.output / ("search/prompts.json" if options.search else "prompts.json")
    write_once(file, {"prompts": list(dataset["prompt"]), "categories": list(dataset["category"])})
    needed = BYTES_PER_RUN * sum(not job.finished(options.output) for job in jobs)
    free = disk_usage(options.output).free
    if free < needed:
        raise OSError(
            f"{options.output} has {free / 2**20:.0f} MiB of free space, expected {needed / 2**20:.0f} MiB for the "
            "runs that are left. Make room, or choose another --output-dir."
        )


def renew_starts(jobs: Sequence[Job], output: Path) -> None:
    """Have a run made anew whose model is gone, as git keeps none, but is the start of one that is left."""
    for job in jobs:
        if job.start is not None and not job.finished(output) and not (job.start.folder(output) / "model").is_dir():
            (job.start.folder(output) / "run.json").unlink(missing_ok=True)


def do(options: PaperOptions, jobs: Sequence[Job], console: Console) -> int:
    """Do jobs that have been prepared; returns the exit code."""
    scale = options.scale

    def command(job: Job) -> list[str]:
        wanted: dict[str, object] = {
            "--seed": job.seed,
            "--rollouts": scale.generations,
            "--num-prompts": scale.num_prompts,
        }
        wanted |= {"--split": scale.split, "--chosen": options.chosen}
        wanted |= {} if job.candidate is None else {"--candidate": job.candidate}
        options_of_run = [str(part) for pair in wanted.items() for part in pair]
        module = [sys.executable, "-m", "trl_unigrpo.experiments.paper.run"]
        return [*module, str(options.output), job.system, *options_of_run, "--end-with-parent"]

    left = [job for job in jobs if not job.finished(options.output)]
    with Display(console, options.output, len(left), 192 * scale.generations) as display:
        outcome = run_all(left, options.output, options.jobs, command, display)
    if outcome.signal is not None:
        console.print("Stopped. The same command does the runs that are left.")
        return 128 + outcome.signal
    if outcome.failed:
        console.print(f"Failed: {', '.join(map(str, outcome.failed))}. The same command tries them again.")
    return 1 if outcome.failed else 0


def run_grid(options: PaperOptions, console: Console) -> int:
    """Do the grid's runs, and write the page of all that are finished."""
    from .chosen import read_entries, write_entries

    jobs = options.all_jobs
    prepare_runs(options, jobs)
    write_entries(options.output / "chosen.json", read_entries(options.chosen))
    code = do(options, jobs, console)
    if code <= 1 and any(job.finished(options.output) for job in jobs):
        from .page import write_paper_page
        from .results import collect

        collect(options.output, expected_seeds(jobs) if options.quick else None)
        console.print(f"Page: {write_paper_page(options.output, options.page)}")
    return code


def expected_seeds(jobs: Sequence[Job]) -> dict[str, list[int]]:
    """List system -> its seeds."""
    return {name: [job.seed for job in jobs if job.system == name] for name in dict.fromkeys(j.system for j in jobs)}


def search(options: PaperOptions, console: Console) -> int:
    """
    Try the candidates of each system on validation prompts, and write the choice for those that are complete.

    Entries of other systems stay as they are. A system that takes another's choice over waits for it.
    """
    from .chosen import choose_from_folders, read_entries, write_entries

    if not os.access(options.chosen if options.chosen.exists() else options.chosen.parent, os.W_OK):
        raise OSError(f"{options.chosen} can't be written. Name another file for the choice with --chosen.")
    waiting, worst = options.systems, 0
    while waiting:
        entries = read_entries(options.chosen)
        ready = [
            system
            for system in waiting
            if all(name in entries and SYSTEMS[name] not in waiting for name in system.takes)
        ]
        if not ready:
            missing = sorted({name for system in waiting for name in system.takes if name not in entries})
            raise ValueError(
                f"{', '.join(system.name for system in waiting)} can't be searched without a choice for "
                f"{', '.join(missing)}. Search it first: trl-unigrpo paper --search --only {','.join(missing)}"
            )
        jobs = [job for system in ready for job in search_jobs(system)]
        prepare_runs(options, jobs)
        code = do(options, jobs, console)
        if code > 1:
            return code
        worst = max(worst, code)
        for system in ready:
            if all(job.finished(options.output) for job in search_jobs(system)):
                entries[system.name] = choose_from_folders(system, options.output)
                console.print(choice_line(system, entries[system.name]), soft_wrap=True, highlight=False)
        write_entries(options.chosen, entries)
        waiting = [system for system in waiting if system not in ready]
    console.print(f"Choices: {options.chosen}")
    return worst


def choice_line(system: System, entry: dict) -> str:
    """Say in a line what was chosen, and what is doubtful about it."""
    values = ", ".join(f"{name} {value:g}" for name, value in entry["settings"].items())
    best = next(of for of in entry["candidates"] if of["settings"] == entry["settings"])
    line = f"{system.name}: {values} ({best['reward']:.3f})"
    if entry["at_edge"]:
        line += f"; at the edge of what was tried: {', '.join(entry['at_edge'])}"
    if entry["as_good"]:
        line += f"; not clearly better than candidate {', '.join(map(str, entry['as_good']))}"
    return line
