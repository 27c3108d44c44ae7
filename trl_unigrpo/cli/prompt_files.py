"""Prompts from files, folders, the hub and the built-in world."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


# Files that `datasets` reads, by their ending. A text file holds one prompt per line that is not blank.
_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def load_prompts(name: str, split: str, config: str | None = None) -> Dataset:
    """Rows with a column `prompt`, from wherever `name` points."""
    if name == "shapeworld":
        from ..shapeworld.dataset import shapeworld_dataset

        return shapeworld_dataset(split)
    kind = _FILES.get(Path(name).suffix)
    if kind is None:
        return load_dataset(name, config, split=split)
    if not Path(name).is_file():
        raise FileNotFoundError(f"{name!r}: no such file. Pass a file, a folder, a hub id or 'shapeworld'.")
    dataset = load_dataset(kind, data_files=name, split="train")
    if kind == "text":
        return dataset.rename_column("text", "prompt").filter(lambda row: row["prompt"].strip())
    return dataset


def read_rows(name: str, split: str = "train") -> Iterable[Mapping[str, Any]]:
    """
    Rows with a column `prompt`, from a file, a folder or the hub.

    Raises:
        OSError, ValueError: if they can't be read.
    """
    if not name.endswith(".jsonl"):
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
