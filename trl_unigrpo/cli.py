"""The command line, thin: each command imports what it needs when it runs, so that `--help` answers at once."""

from typing import Annotated

import typer

from .__about__ import __version__


app = typer.Typer(
    name="trl-unigrpo",
    help="UniGRPO with TRL: train the thinking and the painting of one unified model from one reward on the picture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# What a bug report needs: the packages whose version changes what training does.
REPORTED_PACKAGES = ("torch", "trl", "transformers", "diffusers", "peft", "accelerate", "datasets")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def version() -> None:
    """Show the versions of this package and of those it builds on."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    typer.echo(f"trl-unigrpo {__version__}")
    typer.echo(f"python {platform.python_version()}")
    for package in REPORTED_PACKAGES:
        try:
            typer.echo(f"{package} {version_of(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} not installed")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
