"""`trl-unigrpo version`."""

import platform

import typer

from ..__about__ import versions


def version_command() -> None:
    """Show the versions of this package and of those it builds on."""
    for package, found in {"python": platform.python_version(), **versions()}.items():
        typer.echo(f"{package} {found}")
