"""The file that [`decompose_rows`] adds to, line by line, and the one beside it of rows that failed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .question import Question, read_questions


_START = b'{"prompt_hash": "'


def prompt_hash(prompt: str) -> str:
    """Return the key of a prompt in the output: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def failures_file(output: str | Path) -> Path:
    """Name the file of the rows that failed, beside the output: `out.jsonl` -> `out.failures.jsonl`."""
    output = Path(output)
    return output.with_name(f"{output.stem}.failures.jsonl")


def write_questions(lines: TextIO, key: str, row: Mapping[str, Any], questions: Sequence[Question]) -> None:
    """Add a row with its questions; on disk when this returns."""
    found = {"prompt_hash": key, "questions": [question.to_dict() for question in questions]}
    record = {"prompt_hash": key, **row} | found
    lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    lines.flush()


def write_failure(lines: TextIO, number: int, row: Mapping[str, Any], error: Exception) -> None:
    """Add a row that failed, with its place in the input and the reason; on disk when this returns."""
    record = {"row": number, "prompt": row.get("prompt"), "error": f"{type(error).__name__}: {error}"}
    lines.write(json.dumps(record, default=str) + "\n")
    lines.flush()


def finished(output: Path) -> set[str]:
    """
    Read the hashes of the prompts in an earlier run's output, and cut off a line that this run was killed in.

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
