"""Prompts to question lists, line by line into a file that a later run goes on with."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...messages import user_text
from .question import Question, read_questions


Row = Mapping[str, Any]
Decomposer = Callable[[Row], Awaitable[tuple[Question, ...]]]
"""From one row, with its `prompt`, to questions; raises where it can't."""

_START = b'{"prompt_hash": "'


@dataclass
class Report:
    """
    What became of the rows.

    Args:
        written: rows that were decomposed.
        skipped: rows whose prompt is in the output already.
        repeated: rows whose prompt stands in the input before; each prompt is decomposed once.
        failed: rows that could not be decomposed.
        left: rows that were not tried, as too many had failed in a row.
    """

    written: int = 0
    skipped: int = 0
    repeated: int = 0
    failed: int = 0
    left: int = 0


def prompt_hash(prompt: str) -> str:
    """What a prompt is known by in the output: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def failures_file(output: str | Path) -> Path:
    """Where the rows that failed are written, beside the output: `out.jsonl` -> `out.failures.jsonl`."""
    output = Path(output)
    return output.with_name(f"{output.stem}.failures.jsonl")


async def decompose_rows(
    rows: Iterable[Row],
    decomposer: Decomposer,
    output: str | Path,
    *,
    concurrency: int = 16,
    max_failures_in_a_row: int = 20,
    on_row: Callable[[int, int], None] | None = None,
) -> Report:
    """
    Write each row with its `questions` and `prompt_hash` as a line of JSON, as soon as they are there.

    Prompts that the output has already are skipped. Rows that fail go to [`failures_file`], with the reason, and are
    tried again by the next run. Lines stand in the order of the answers.

    Args:
        rows: each with a `prompt`, a string or a conversation. Other columns are kept.
        decomposer: such as [`LLMDecomposer`].
        output: a file, which is added to.
        concurrency: rows that are decomposed at once.
        max_failures_in_a_row: after so many the run stops, as the endpoint is not what it should be.
        on_row: called with (rows done, rows to do) at the start and after each.

    Raises:
        ValueError: if the output was not written by this function.
    """
    if concurrency < 1 or max_failures_in_a_row < 1:
        raise ValueError(
            f"concurrency={concurrency}, max_failures_in_a_row={max_failures_in_a_row}: expected at least 1."
        )
    output, report = Path(output), Report()
    known, todo, unreadable = finished(output), {}, []
    for row in rows:
        try:
            key = prompt_hash(_prompt(row))
        except Exception as error:
            unreadable.append((row, error))
            continue
        report.skipped += key in known
        report.repeated += key in todo
        if key not in known and key not in todo:
            todo[key] = row
    waiting, total, in_a_row = iter(todo.items()), len(todo), 0

    failures = failures_file(output)
    with output.open("a", encoding="utf-8") as lines, failures.open("w", encoding="utf-8") as failed_lines:

        def fail(row: Row, error: Exception) -> None:
            report.failed += 1
            record = {"prompt": row.get("prompt"), "error": f"{type(error).__name__}: {error}"}
            failed_lines.write(json.dumps(record, default=str) + "\n")
            failed_lines.flush()

        def progress() -> None:
            if on_row is not None:
                on_row(total - report.left, total)

        async def work() -> None:
            nonlocal in_a_row
            while in_a_row < max_failures_in_a_row and (item := next(waiting, None)) is not None:
                key, row = item
                try:
                    questions = await decomposer(row)
                    found = {"prompt_hash": key, "questions": [question.to_dict() for question in questions]}
                    record = {"prompt_hash": key, **row} | found
                    lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                    lines.flush()
                    report.written, in_a_row = report.written + 1, 0
                except Exception as error:  # one row's, whatever it is: the others go on
                    fail(row, error)
                    in_a_row += 1
                report.left -= 1
                progress()

        for row, reason in unreadable:
            fail(row, reason)
        report.left = total
        progress()
        await asyncio.gather(*(work() for _ in range(min(concurrency, total))))
    if not report.failed:
        failures.unlink()
    return report


def finished(output: Path) -> set[str]:
    """
    Hashes of the prompts in an earlier run's output; a line that this run was killed in is cut off.

    Raises:
        ValueError: if the file was not written by [`decompose_rows`].
    """
    if not output.exists():
        return set()
    whole, newline, torn = output.read_bytes().rpartition(b"\n")
    found = set()
    for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
        try:
            record = json.loads(line)
            read_questions(record["questions"])
            found.add(record["prompt_hash"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{output}, line {number}: no row with 'prompt_hash' and 'questions' ({error}). Pass another output, "
                "or mend the line."
            ) from error
    if torn:
        if not (torn.startswith(_START) or _START.startswith(torn)):
            raise ValueError(f"{output} ends with a line of something else. Pass another output.")
        with output.open("rb+") as file:
            file.truncate(len(whole) + len(newline))
    return found


def _prompt(row: Row) -> str:
    if row.get("prompt") is None:
        raise ValueError(f"There is no prompt (the row has: {', '.join(sorted(row)) or 'nothing'}).")
    text = user_text(row["prompt"])
    if not text.strip():
        raise ValueError("The prompt is empty.")
    return text


async def by_rule(row: Row) -> tuple[Question, ...]:
    """The decomposer of rows with GenEval's metadata."""
    from ..geneval.geneval_questions import questions_from_geneval

    return questions_from_geneval(row)


def decompose_with_progress(
    rows: Iterable[Row],
    output: str | Path,
    *,
    model: str | None = None,
    base_url: str | None = None,
    geneval: bool = False,
    concurrency: int = 16,
    **options: Any,
) -> Report:
    """
    [`decompose_rows`] with a progress bar, from synchronous code.

    Args:
        model, base_url, options: of [`LLMDecomposer`].
        geneval: rows are GenEval's metadata; no model is asked.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if geneval == (model is not None):
        raise ValueError("Pass a model that decomposes the prompts, or geneval for rows with GenEval's metadata.")

    async def main(on_row: Callable[[int, int], None]) -> Report:
        if model is None:
            return await decompose_rows(rows, by_rule, output, concurrency=concurrency, on_row=on_row)
        from .llm_decomposer import LLMDecomposer

        async with LLMDecomposer(model, base_url, **options) as decomposer:
            return await decompose_rows(rows, decomposer, output, concurrency=concurrency, on_row=on_row)

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("decompose", total=None)
        return asyncio.run(main(lambda done, total: bar.update(task, completed=done, total=total)))
