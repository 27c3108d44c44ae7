"""`trl-unigrpo decompose`."""

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from .options import told_in_a_line


@dataclass(frozen=True)
class DecomposeOptions:
    """Where prompts come from, where their questions go, and who writes them."""

    input: Annotated[str, typer.Option(help="Prompts: a csv, json, jsonl, parquet or txt file, a folder or hub id.")]
    output: Annotated[
        str, typer.Option(help="jsonl file of the rows with their questions; a later run goes on with it.")
    ]
    model: Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")] = None
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY.")
    ] = None
    geneval: Annotated[
        bool, typer.Option("--geneval", help="Rows are GenEval's metadata: questions by rule, without a model.")
    ] = False
    split: Annotated[str, typer.Option(help="Split of a folder or hub dataset.")] = "train"
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16


@dataclass(frozen=True)
class DecomposerOptions:
    """Arguments of [`LLMDecomposer`] of the same names."""

    quality: Annotated[bool, typer.Option(help="Also ask for questions about the image's quality.")] = True
    attempts: Annotated[int, typer.Option(min=1, help="Answers per prompt before it counts as failed.")] = 3
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take before it is repeated.")] = 120.0
    max_retries: Annotated[int, typer.Option(min=0, help="Repetitions of a request that the endpoint failed on.")] = 4


def decompose_command(options: DecomposeOptions, decomposer: DecomposerOptions) -> None:
    """Turn prompts into yes-no questions for DVReward and QuestionReward."""
    from ..rewards.questions.decompose import decompose_with_progress, failures_file
    from .prompt_files import read_rows

    with told_in_a_line("decompose", ValueError, OSError, ImportError):
        report = decompose_with_progress(
            read_rows(options.input, options.split),
            options.output,
            model=options.model,
            base_url=options.base_url,
            geneval=options.geneval,
            concurrency=options.concurrency,
            **asdict(decomposer),
        )
    typer.echo(
        f"{options.output}: {report.written} decomposed, {report.skipped} there already, {report.repeated} repeated, "
        f"{report.failed} failed, {report.left} not tried."
    )
    if report.failed:
        typer.echo(f"{failures_file(options.output)} says why. The same command tries them again.", err=True)
        raise typer.Exit(1)
