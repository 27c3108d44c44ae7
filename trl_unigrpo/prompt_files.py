"""Prompts from files, folders, the hub and the built-in world."""

from pathlib import Path

from datasets import Dataset, load_dataset


# Files that `datasets` reads, by their ending. A text file holds one prompt per line.
_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def load_prompts(name: str, split: str, config: str | None = None) -> Dataset:
    """Rows with a column `prompt`, from wherever `name` points."""
    if name == "shapeworld":
        from .shapeworld import shapeworld_dataset

        return shapeworld_dataset(split)
    kind = _FILES.get(Path(name).suffix)
    if kind is None:
        return load_dataset(name, config, split=split)
    if not Path(name).is_file():
        raise FileNotFoundError(f"{name!r}: no such file. Pass a file, a folder, a hub id or 'shapeworld'.")
    dataset = load_dataset(kind, data_files=name, split="train")
    return dataset.rename_column("text", "prompt") if kind == "text" else dataset
