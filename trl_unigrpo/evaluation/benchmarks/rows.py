"""Rows of benchmark files, each with where it stands; a row that can't be read costs that row alone."""

import codecs
import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..benchmark import Item


Found = tuple[str, Any]
"""Where a row stands ("prompts.jsonl, line 7"), and the row, or the error that it can't be read for."""

Known = Callable[[dict[str, Any]], tuple[Any, Any]]
"""From a row to the name that the benchmark knows it by, and to what it says."""

_NEXT_ROW = re.compile(r"[^\s,]")

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
            except (ValueError, RecursionError) as error:  # Unicode's errors are ValueErrors, too
                yield f"{file.name}, line {number}", ValueError(f"no JSON ({error})")


def _json_list(file: Path) -> Iterator[Found]:
    raw = file.read_bytes()
    try:
        text = raw.decode(json.detect_encoding(raw))
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds a {type(rows).__name__}, expected a list of objects.")
    # Once more, row by row, for the lines that they begin in.
    line, counted, end = 1, 0, text.index("[") + 1
    for number, row in enumerate(rows):
        start = _NEXT_ROW.search(text, end).start()  # type: ignore[union-attr]  # there is one
        line, counted = line + text.count("\n", counted, start), start
        _, end = json.JSONDecoder().raw_decode(text, start)
        yield f"{file.name}, entry {number} (line {line})", row


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
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
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


def once(rows: Iterable[Found], known_by: Known = lambda row: (row, None)) -> tuple[list[Found], list[str]]:
    """
    Leave out rows that another file of the folder has, too, as a benchmark's files and all of them in one.

    Args:
        known_by: of rows that another file may have with other columns; by default only equal rows are the same.

    Returns:
        The other rows, and a line for each pair of files.

    Raises:
        ValueError: if two files say different things under one name: which one is meant?
    """
    kept, repeated = [], defaultdict[tuple[str, str], list[str]](list)
    first: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        try:
            name, says = (json.dumps(part, sort_keys=True, default=repr) for part in known_by(as_object(row)))
        except (KeyError, TypeError, ValueError):  # of no form: whoever reads it says so
            kept.append((where, row))
            continue
        there, said = first.setdefault(name, (where, says))
        if file_of(there) == file_of(where):
            kept.append((where, row))
        elif says == said:
            repeated[file_of(where), file_of(there)].append(where)
        else:
            raise ValueError(
                f"{where} and {there} both have {name}, with other words. Pass the file that you mean, or a folder "
                "without the other one."
            )
    problems = [
        f"{places[0]}: stands in {other}, too, like {len(places) - 1} more rows of {file}; each counts once"
        for (file, other), places in repeated.items()
    ]
    return kept, problems


def file_of(where: str) -> str:
    """Name the file of a place."""
    return where.rpartition(", ")[0]


def parse(rows: Iterable[Found], to_items: Callable[[dict[str, Any], str], Iterable[Item]]) -> Any:
    """
    Make the items of all rows that can be read, each with a key of its own, and a line on each of the others.

    Args:
        to_items: from a row and where it stands to its items; KeyError, TypeError and ValueError leave the row out.

    Returns:
        Items and problems, both tuples.
    """
    items: list[Item] = []
    problems: list[str] = []
    places: dict[str, str] = {}
    for where, row in rows:
        try:
            found = list(to_items(as_object(row), where))
            if taken := [item.key for item in found if item.key in places]:
                raise ValueError(f"{taken[0]!r} is already {places[taken[0]]}")
            places |= {item.key: where for item in found}
            items += found
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
