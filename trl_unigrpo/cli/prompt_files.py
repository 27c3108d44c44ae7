"""Prompts from files, folders, the hub and the built-in world."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


# Files that `datasets` reads, by their ending. A text file holds one prompt per line that is not blank.
_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def load_prompts(name: str, split: str, config: str | None = None) -> Dataset:
    """
    Read rows with a column `prompt`, from wherever `name` points.

    Args:
        split: of a hub dataset, a folder or `shapeworld`. A file is one split, "train"; slices such as "train[:90%]"
            work for all but `shapeworld`.
        config: of a hub dataset or a folder.

    Raises:
        OSError, ValueError: if there are no such rows, with what to pass.
    """
    if config is not None and (name == "shapeworld" or is_file(name)):
        raise ValueError(f"dataset_config={config!r} does nothing here: {name!r} has no configurations. Leave it out.")
    if name == "shapeworld":
        from ..shapeworld.dataset import shapeworld_dataset

        return shapeworld_dataset(split)
    if not is_file(name):
        return load_dataset(name, config, split=split)
    if split.partition("[")[0] != "train":
        raise ValueError(
            f"{name!r} has no split {split!r}: a file is one split, 'train'. Pass another file, or slices of this "
            "one, such as 'train[:90%]' and 'train[90%:]'."
        )
    kind = _FILES[Path(name).suffix.lower()]
    dataset = load_dataset(kind, data_files=name, split=split)
    if kind == "text":
        return dataset.rename_column("text", "prompt").filter(lambda row: row["prompt"].strip())
    return dataset


def is_file(name: str) -> bool:
    """
    Say whether a dataset's name is that of a file.

    Raises:
        FileNotFoundError: if it has a file's ending, and there is none.
        ValueError: if it is one of another kind.
    """
    known = Path(name).suffix.lower() in _FILES
    if known and not Path(name).is_file():
        raise FileNotFoundError(f"{name!r}: no such file. Pass a file, a folder, a hub id or 'shapeworld'.")
    if Path(name).is_file() and not known:
        raise ValueError(f"{name!r} is no file of prompts: expected one that ends in {', '.join(_FILES)}.")
    return known


def read_rows(name: str, split: str = "train") -> Iterable[Mapping[str, Any]]:
    """
    Rows with a column `prompt`, from a file, a folder or the hub.

    Raises:
        OSError, ValueError: if they can't be read.
    """
    if not name.endswith(".jsonl") or split != "train":
        return load_prompts(name, split)
    rows = []
    # Line by line: a table of typed columns can't hold GenEval's positions, ["left of", 0].
    for number, line in enumerate(Path(name).read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number} is no JSON ({error}).") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f'{name}, line {number} is no JSON object, as in {{"prompt": "a red cat"}}.')
    return rows
