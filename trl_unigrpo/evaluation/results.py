"""A folder of results: settings that never change, and a line of JSON per image that is added as it is scored.

settings.json     all that the images and scores depend on
results.jsonl     one line per image, in the order of painting
images/00000/     of each prompt GenEval's layout: `metadata.jsonl`, one object, and `samples/0000.png`, ...;
                  beside them `sources/0000.jpg`, ..., small copies of the images that it edits
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..monitoring.files import replace_file
from ..reporting.pages import jpeg


SETTINGS, RESULTS = "settings.json", "results.jsonl"
SOURCE_SIDE = 512
"""Pixels of the longer side of a source image's copy, at most."""

Line = dict[str, Any]


class DifferentSettingsError(ValueError):
    """A folder holds the results of other settings."""


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Make the folder, or see that what it holds came from the same settings.

    What scores may be named later: `settings["scorer"]` None stands for images that wait for a scorer.

    Raises:
        DifferentSettingsError: with what differs.
        ValueError: if the folder holds results and can't say from which settings.
    """
    settings = json.loads(json.dumps(settings))
    file = folder / SETTINGS
    if file.is_file():
        kept = read_settings(folder)
        found = differences(kept, settings)
        if kept.get("scorer") is None:
            found = {name: pair for name, pair in found.items() if name.split(".")[0] != "scorer"}
        if found:
            listed = "".join(
                f"\n  {name}: {_short(old)} there, {_short(new)} now" for name, (old, new) in found.items()
            )
            raise DifferentSettingsError(
                f"{folder} holds results of other settings:{listed}\nName another folder, or repeat the settings."
            )
    elif (folder / RESULTS).exists():
        raise ValueError(f"{folder} has {RESULTS} but no {SETTINGS}. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(settings, indent=2) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a folder of results; ValueError if it is none."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no results of `trl-unigrpo eval`: {SETTINGS} can't be read ({error})."
        ) from error
    return found


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """List the dotted names of what differs between two settings, with both values; None for what is not there."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return {
            inner: pair
            for key in keys
            for inner, pair in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key).items()
        }
    return {} if old == new else {name: (old, new)}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_lines(folder: Path) -> list[Line]:
    """
    Read the whole lines of a folder; of a run that was killed in a line that line is left out.

    Raises:
        ValueError: if the file was not written by this package.
    """
    file = folder / RESULTS
    if not file.exists():
        return []
    whole = file.read_bytes().rpartition(b"\n")[0]
    lines = []
    for number, text in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            line = json.loads(text)
            line["row"], line["reward"], line["key"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number}: no result ({type(error).__name__}: {error}).") from error
        lines.append(line)
    return lines


def write_lines(folder: Path, lines: Iterable[Line]) -> None:
    """Replace all lines at once: whoever reads finds the old file or the new one."""
    replace_file(folder / RESULTS, "".join(map(_as_text, lines)))


def append_lines(folder: Path, lines: Iterable[Line]) -> None:
    """Add lines, each on the disk before this returns."""
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(_as_text(line))
            file.flush()
        os.fsync(file.fileno())


def _as_text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def image_file(place: int, sample: int) -> str:
    """Give the path of an image below the folder, as GenEval's scorer finds it."""
    return f"images/{place:05}/samples/{sample:04}.png"


def source_files(folder: Path, place: int) -> list[Path]:
    """Find the copies of the images that a prompt edits."""
    return sorted((folder / f"images/{place:05}/sources").glob("*.jpg"))


def write_sources(folder: Path, place: int, images: Iterable[Image.Image]) -> None:
    """Write copies of the images that a prompt edits, for the page."""
    for number, image in enumerate(images):
        file = folder / f"images/{place:05}/sources/{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(image, SOURCE_SIDE))


def write_metadata(folder: Path, place: int, row: Mapping[str, Any]) -> None:
    """Write the benchmark's row beside the prompt's images, as the one object that GenEval's scorer reads."""
    file = folder / f"images/{place:05}/metadata.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(row, default=str) + "\n")
