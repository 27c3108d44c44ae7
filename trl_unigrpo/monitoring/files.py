"""Files that are never seen half written."""

from pathlib import Path


def replace_file(file: Path, text: str) -> None:
    """Write a text file: whoever opens it finds the old content or the new, whatever interrupts the writing."""
    fresh = file.with_name(f".{file.name}.part")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)
