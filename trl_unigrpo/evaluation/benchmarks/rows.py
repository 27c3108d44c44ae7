"""Rows of benchmark files, each with where it stands; a row that can't be read costs that row alone."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..benchmark import Item


Found = tuple[str, Any]
"""Where a row stands ("prompts.jsonl, line 7"), and the row, or the error that it can't be read for."""

FORMATS = (".csv", ".json", ".jsonl", ".parquet", ".txt")


def located_rows(path: str | Path, *formats: str) -> Iterator[Found]:
    """
    Read the rows of a file, or of all files of a folder that have one of the formats, in the order of their names.

    Args:
        formats: endings of the names, some of `FORMATS`.

    Raises:
        OSError: if there is no such file.
        ValueError: if it has another format, or as a whole can't be read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in formats)
        if not files:
            raise FileNotFoundError(f"{path} has no file that ends in {' or '.join(formats)}.")
    else:
        files = [path]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder.")
        if path.suffix not in formats:
            raise ValueError(f"{path}: expected a file that ends in {' or '.join(formats)}.")
    for file in files:
        yield from _READERS[file.suffix](file)


def _json_lines(file: Path) -> Iterator[Found]:
    # Lines are cut by hand: str.splitlines also cuts at characters that JSON allows inside of a text.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"{file.name}, line {number}", json.loads(line)
            except ValueError as error:  # Unicode's errors are ValueErrors, too
                yield f"{file.name}, line {number}", ValueError(f"no JSON ({error})")


def _json_list(file: Path) -> Iterator[Found]:
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds a {type(rows).__name__}, expected a list of objects.")
    for number, row in enumerate(rows):
        yield f"{file.name}, entry {number}", row


def _csv(file: Path) -> Iterator[Found]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        last = 1
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{file}, after line {reader.line_num}: {error}.") from error
            where, last = f"{file.name}, line {last + 1}", reader.line_num
            if row.get(None) or None in row.values():
                yield (
                    where,
                    ValueError(f"not as many cells as the header has columns ({len(reader.fieldnames or ())})"),
                )
            else:
                yield where, row


def _text(file: Path) -> Iterator[Found]:
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"{file.name}, line {number}", {"prompt": line.decode().rstrip("\r")}
            except UnicodeDecodeError as error:
                yield f"{file.name}, line {number}", error


def _parquet(file: Path) -> Iterator[Found]:
    from datasets import load_dataset

    for number, row in enumerate(undecoded(load_dataset("parquet", data_files=str(file), split="train"))):
        yield f"{file.name}, row {number}", row


def undecoded(dataset: Any) -> Any:
    """Leave a dataset's images the files that they are: decoding thousands of them takes minutes."""
    from datasets import Image

    for name, kind in dataset.features.items():
        if isinstance(kind, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


_READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".csv": _csv,
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".txt": _text,
}


def parse(rows: Iterable[Found], to_items: Callable[[dict[str, Any], str], Iterable[Item]]) -> Any:
    """
    Make the items of all rows that can be read, and a line on each of the others.

    Args:
        to_items: from a row and where it stands to its items; KeyError, TypeError and ValueError leave the row out.

    Returns:
        Items and problems, both tuples.
    """
    items: list[Item] = []
    problems: list[str] = []
    for where, row in rows:
        try:
            items += to_items(as_object(row), where)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{where}: {row_problem(error)}")
    return tuple(items), tuple(problems)


def as_object(row: Any) -> dict[str, Any]:
    """Return the row, if it is a mapping; raises the error that stands in its place."""
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, dict):
        raise TypeError(f"a {type(row).__name__}, expected an object")
    return row


def row_problem(error: Exception) -> str:
    """Say what is wrong with a row, in one line of 300 characters at most."""
    text = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def texts(row: dict[str, Any], name: str) -> list[str]:
    """Read a list of texts in a row."""
    found = row[name]
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name!r} is {str(found)[:60]!r}, expected a list of texts")
    return found
