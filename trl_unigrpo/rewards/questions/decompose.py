"""Prompts to question lists, line by line into a file that a later run goes on with."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ...messages import user_text
from .question import Question
from .question_file import failures_file, finished, prompt_hash, write_failure, write_questions


Row = Mapping[str, Any]
Decomposer = Callable[[Row], Awaitable[tuple[Question, ...]]]
"""From one row, with its `prompt`, to questions; raises where it can't."""


@dataclass
class Report:
    """
    Numbers of rows, by what became of them.
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

    Prompts that the output has already are skipped. Rows that fail go to [`failures_file`], with their number in the
    input, from 1, and the reason, and are tried again by the next run. Lines stand in the order of the answers.

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
    todo, unreadable = _sorted_out(rows, finished(output), report)
    failures = failures_file(output)
    with output.open("a", encoding="utf-8") as lines, failures.open("w", encoding="utf-8") as failed_lines:
        work = _Work(todo, decomposer, lines, failed_lines, report, max_failures_in_a_row, on_row)
        for number, row, reason in unreadable:
            work.fail(number, row, reason)
        report.left = len(todo)
        work.tell()
        await asyncio.gather(*(work.go() for _ in range(min(concurrency, len(todo)))))
    if not report.failed:
        failures.unlink()
    return report


def _sorted_out(
    rows: Iterable[Row], known: Collection[str], report: Report
) -> tuple[dict[str, tuple[int, Row]], list[tuple[int, Row, Exception]]]:
    """Return the rows to do, by the hash of their prompt, and those without one, all numbered; count the others."""
    todo: dict[str, tuple[int, Row]] = {}
    unreadable: list[tuple[int, Row, Exception]] = []
    for number, row in enumerate(rows, start=1):
        try:
            key = prompt_hash(_prompt(row))
        except Exception as error:
            unreadable.append((number, row, error))
            continue
        report.skipped += key in known
        report.repeated += key in todo
        if key not in known and key not in todo:
            todo[key] = number, row
    return todo, unreadable


def _prompt(row: Row) -> str:
    if row.get("prompt") is None:
        raise ValueError(f"There is no prompt (the row has: {', '.join(sorted(row)) or 'nothing'}).")
    text = user_text(row["prompt"])
    if not text.strip():
        raise ValueError("The prompt is empty.")
    return text


class _Work:
    """The rows of one run, which several workers take from, and the files that they write to."""

    def __init__(
        self,
        todo: Mapping[str, tuple[int, Row]],
        decomposer: Decomposer,
        lines: TextIO,
        failed_lines: TextIO,
        report: Report,
        max_failures_in_a_row: int,
        on_row: Callable[[int, int], None] | None,
    ):
        self.waiting, self.total = iter(todo.items()), len(todo)
        self.decomposer, self.on_row = decomposer, on_row
        self.lines, self.failed_lines, self.report = lines, failed_lines, report
        self.in_a_row, self.max_failures_in_a_row = 0, max_failures_in_a_row

    async def go(self) -> None:
        """Decompose one row after the other until none waits, or too many have failed in a row."""
        while self.in_a_row < self.max_failures_in_a_row and (item := next(self.waiting, None)) is not None:
            key, (number, row) = item
            try:
                write_questions(self.lines, key, row, await self.decomposer(row))
                self.report.written, self.in_a_row = self.report.written + 1, 0
            except Exception as error:  # one row's, whatever it is: the others go on
                self.fail(number, row, error)
                self.in_a_row += 1
            self.report.left -= 1
            self.tell()

    def fail(self, number: int, row: Row, error: Exception) -> None:
        """Count and write a row that failed."""
        self.report.failed += 1
        write_failure(self.failed_lines, number, row, error)

    def tell(self) -> None:
        """Say how many rows are done."""
        if self.on_row is not None:
            self.on_row(self.total - self.report.left, self.total)


async def by_rule(row: Row) -> tuple[Question, ...]:
    """Decompose a row with GenEval's metadata."""
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
    Run [`decompose_rows`] with a progress bar, from synchronous code.

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
