"""`trl-unigrpo report`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from .options import told_in_a_line


@dataclass(frozen=True)
class ReportOptions:
    """Arguments and options of `trl-unigrpo report`."""

    runs: Annotated[list[str], typer.Argument(help="Output folders of runs: finished, going on, or broken off.")]
    output: Annotated[
        str | None,
        typer.Option(help="The page; gallery.html in the folder of a single run, comparison.html here for several."),
    ] = None


def report_command(options: ReportOptions) -> None:
    """Write the page of a run, or of several side by side: images, curves, alarms."""
    from ..reporting.run_page import write_report

    with told_in_a_line("report", ValueError, OSError):
        typer.echo(f"{write_report(options.runs, options.output)}")
