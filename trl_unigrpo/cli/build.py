"""`trl-unigrpo build-shapeworld` and `build-shapeworld-reward`."""

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True)
class BuildOptions:
    """Options of `trl-unigrpo build-shapeworld`."""

    output_dir: Annotated[str, typer.Option(help="Folder for the demo's model.")] = "shapeworld-base"
    seeing_dir: Annotated[str, typer.Option(help="Folder for the model that also sees.")] = "shapeworld-seeing-base"
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the autoencoder, the corpus, the weights and the order.")
    ] = 0


def build_command(options: BuildOptions) -> None:
    """Pre-train the base models from nothing: the demo's, then the one that also sees (25 to 30 CPU minutes)."""
    from ..experiments.base.build import build_base, build_seeing_base
    from ..experiments.base.scores import base_scores
    from ..shapeworld.tokenizer import shapeworld_tokenizer

    base = build_base(options.output_dir, options.seed)
    seeing = build_seeing_base(base, options.seeing_dir, options.seed)
    for name, value in base_scores(seeing, shapeworld_tokenizer(seeing=True)).items():
        typer.echo(f"{name:<36}{value:8.4f}")


@dataclass(frozen=True)
class BuildRewardOptions:
    """Options of `trl-unigrpo build-shapeworld-reward`."""

    output_file: Annotated[str, typer.Option(help="File for the weights.")] = "preference.safetensors"
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images, the annotator, the weights and the order.")] = 0


def build_reward_command(options: BuildRewardOptions) -> None:
    """Train ShapeWorld's learned reward on pairs of the base model's own images (about 10 CPU minutes)."""
    from ..experiments.base.train_preference import build_preference

    found = build_preference(options.output_file, options.seed)
    typer.echo("Held-out pairs that it orders as the rule does: all, and those that differ in one check alone")
    for name, (share, number) in found.items():
        typer.echo(f"{name:<12}{share:8.3f}  of {number:,} pairs")
