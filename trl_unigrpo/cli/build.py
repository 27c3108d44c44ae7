"""`trl-unigrpo build-shapeworld`."""

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True)
class BuildOptions:
    """Options of `trl-unigrpo build-shapeworld`."""

    output_dir: Annotated[str, typer.Option(help="Folder for the model.")] = "shapeworld-base"
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the autoencoder, the corpus, the weights and the order.")
    ] = 0


def build_command(options: BuildOptions) -> None:
    """Pre-train the demo's base model from nothing (about 15 CPU minutes)."""
    from ..experiments.base.build import build_base

    build_base(options.output_dir, options.seed)
