"""`trl-unigrpo demo`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer


@dataclass(frozen=True)
class DemoOptions:
    """Options of `trl-unigrpo demo`."""

    output_dir: Annotated[str, typer.Option(help="Folder for the report, the numbers and the trained model.")] = (
        "shapeworld-demo"
    )
    task: Annotated[
        Literal["paint", "refine", "edit"],
        typer.Option(help="Paint from a prompt, paint again after a second look, or edit images."),
    ] = "paint"
    reward: Annotated[
        Literal["rule", "readback"],
        typer.Option(help="The rule, or how well the model reads the prompt back from its image (paint alone)."),
    ] = "rule"
    method: Annotated[
        Literal["fast", "paper", "both"],
        typer.Option(help="Painting by the rule: the fastest settings, the paper's, or both, side by side."),
    ] = "fast"
    rollouts: Annotated[
        int | None,
        typer.Option(min=1, help="Rollouts of 192 trajectories, each trained on twice. By default the task's number."),
        "--steps",
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training; held-out prompts stay the same.")] = 0
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts scored before and after.")] = 1050


def demo_command(options: DemoOptions) -> None:
    """Train a tiny BAGEL on coloured shapes, on a CPU in minutes, and write report.html."""
    from ..experiments.demo.demo import run_demo

    run_demo(
        options.output_dir,
        options.rollouts,
        options.seed,
        options.num_prompts,
        options.task,
        options.reward,
        options.method,
    )
