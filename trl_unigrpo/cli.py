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


@app.command()
def demo(
    output_dir: Annotated[
        str, typer.Option(help="Folder for the report, the numbers and the trained model.")
    ] = "shapeworld-demo",
    steps: Annotated[int, typer.Option(min=1, help="Rollouts of 192 trajectories; each is trained on twice.")] = 140,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training; held-out prompts stay the same.")] = 0,
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts scored before and after.")] = 1050,
) -> None:
    """Train a tiny BAGEL on coloured shapes, on a CPU in minutes, and write report.html."""
    from .shapeworld import run_demo

    run_demo(output_dir, steps, seed, num_prompts)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train with UniGRPO: --config file.yaml, or options; train --help lists them."""
    from .train import main as run

    run(context.args)


@app.command("build-shapeworld")
def build_shapeworld(
    output_dir: Annotated[str, typer.Option(help="Folder for the model.")] = "shapeworld-base",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the autoencoder, the corpus, the weights and the order.")
    ] = 0,
) -> None:
    """Pre-train the demo's base model from nothing (about 15 CPU minutes)."""
    from .shapeworld.build import build_base

    build_base(output_dir, seed)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
