"""`trl-unigrpo paper`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import told_in_a_line


if TYPE_CHECKING:
    from ..experiments.paper.runner import PaperOptions


@dataclass(frozen=True)
class GridOptions:
    """Options of `trl-unigrpo paper`."""

    output_dir: Annotated[
        str | None, typer.Option(help="Folder of the runs; paper-runs, or paper-quick with --quick.")
    ] = None
    only: Annotated[
        list[str] | None,
        typer.Option(help="Systems or groups (table1, figure5, figure4, extras, ablations), repeated or with commas."),
    ] = None
    seeds: Annotated[
        list[str] | None,
        typer.Option(help="Seeds, repeated or with commas; 0 to 4, for extras and ablations 0 to 2."),
    ] = None
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time, a core each; by default all cores.")] = None
    quick: Annotated[bool, typer.Option("--quick", help="A few systems, shorter: minutes instead of hours.")] = False
    search: Annotated[bool, typer.Option("--search", help="Choose learning rates on validation prompts instead.")] = (
        False
    )
    chosen: Annotated[str | None, typer.Option(help="File of the chosen rates; without it, the shipped one.")] = None
    page: Annotated[str | None, typer.Option(help="Markdown file to write; paper.md in the output folder.")] = None
    from_results: Annotated[
        bool, typer.Option("--from-results", help="Only write the page again, from the folder's results.json.")
    ] = False
    show: Annotated[bool, typer.Option("--list", help="Only show the runs that are done and left, and the time.")] = (
        False
    )
    rollouts: Annotated[
        int | None,
        typer.Option(min=2, help="Rollouts of 192 trajectories per run, to try things out; 70, 210 of long runs."),
        "--steps",
    ] = None


def paper_command(options: GridOptions) -> None:
    """Train every system of the paper's tables on ShapeWorld and write a page. Goes on where it stopped."""
    from rich.console import Console

    from ..experiments.paper.runner import run_paper, show_grid

    with told_in_a_line("paper", ValueError, OSError):
        grid = grid_options(options)
        if options.show:
            show_grid(grid, Console())
            return
        code = run_paper(grid, Console())
    raise typer.Exit(code)


def grid_options(options: GridOptions) -> "PaperOptions":
    """Fill in what depends on other options, and on this machine."""
    from ..experiments.paper.runner import PaperOptions, usable_cores
    from ..experiments.paper.systems import CHOSEN

    return PaperOptions(
        output=Path(options.output_dir or ("paper-quick" if options.quick else "paper-runs")),
        chosen=Path(options.chosen) if options.chosen else CHOSEN,
        jobs=options.jobs or usable_cores(),
        only=_parts(options.only),
        seeds=tuple(map(_seed, _parts(options.seeds))) or ((0, 1) if options.quick else None),
        quick=options.quick,
        search=options.search,
        page=Path(options.page) if options.page else None,
        generations=options.rollouts,
        from_results=options.from_results,
    )


def _parts(values: Sequence[str] | None) -> tuple[str, ...]:
    """Take an option apart that is given repeatedly or with commas."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--seeds {text}: expected whole numbers of at least 0, such as 0,1,2.")
    return int(text)
