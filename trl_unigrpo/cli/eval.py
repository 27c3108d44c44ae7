"""`trl-unigrpo eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.options import (
    BaseOptions,
    BenchmarkOptions,
    Judging,
    ModelOptions,
    PaintingOptions,
    RoundsOptions,
)
from .options import told_in_a_line


@dataclass(frozen=True)
class EvalOptions:
    """Options of what is done, and where the results go."""

    output_dir: Annotated[str | None, typer.Option(help="Folder of the results; a later run goes on with it.")] = None
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two folders of results, A and B: paired test, and both side by side."),
    ] = None
    write_prompts: Annotated[
        str | None, typer.Option(help="jsonl file to write GenEval prompts to train on to; --seed, --num-prompts.")
    ] = None


def eval_command(
    prompts: BenchmarkOptions,
    model: ModelOptions,
    base: BaseOptions,
    painting: PaintingOptions,
    rounds: RoundsOptions,
    judging: Judging,
    options: EvalOptions,
) -> None:
    """Paint a benchmark's prompts and score them; or compare two results; or write prompts to train on."""
    from rich.console import Console

    from ..evaluation.command import evaluate, prepare, run_comparison, write_training_prompts
    from ..rewards.common import DeadRewardError

    console = Console()
    try:
        with told_in_a_line("eval", ValueError, OSError, ImportError, NotImplementedError, DeadRewardError):
            if options.compare is not None:
                run_comparison(*options.compare, Path(options.output_dir or "eval-compare"), console)
            elif options.write_prompts is not None:
                number = write_training_prompts(
                    Path(options.write_prompts), painting.seed or 0, prompts.num_prompts or 100
                )
                typer.echo(f"{options.write_prompts}: {number} prompts, none of them GenEval's.")
            else:
                folder = Path(options.output_dir or f"eval-{prompts.name}")
                evaluate(prepare(prompts, painting.seed), model, base, painting, judging, folder, console, rounds)
    except KeyboardInterrupt:
        typer.echo("trl-unigrpo eval: stopped. The same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
