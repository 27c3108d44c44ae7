"""An alarm, and the file that keeps those that were given."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import replace_file


ALARMS_FILE = "alarms.jsonl"
MOST_INDICES = 8
"""Images that an alarm names at most."""


@dataclass(frozen=True)
class Alarm:
    """
    One thing that was seen and should be known.

    Attributes:
        name: what it looks at, such as "images/dark_share".
        message: what was seen and what to do, in one or two sentences.
        values: the numbers behind it.
        indices: the images that it means: their places in [`Generation.images`], counted from 0.
        stops: whether the run should stop for it.
    """

    name: str
    message: str
    values: Mapping[str, float] = field(default_factory=dict)
    indices: tuple[int, ...] = ()
    stops: bool = False

    def __str__(self) -> str:
        images = f" Images {', '.join(map(str, self.indices))}." if self.indices else ""
        return f"{self.name}: {self.message}{images}"


def append_alarm(output_dir: str | Path, step: int, mode: str, alarm: Alarm, stopped: bool) -> None:
    """
    Add a line to `alarms.jsonl`: an object with `step`, `mode`, `alarm`, `message`, `indices`, `values`, `stopped`.

    Args:
        step: optimizer steps made before.
        mode: "train" or "eval", what the indices count images of.
        stopped: whether the run stops for it.
    """
    line = {
        "step": step,
        "mode": mode,
        "alarm": alarm.name,
        "message": alarm.message,
        "indices": list(alarm.indices),
        "values": dict(alarm.values),
        "stopped": stopped,
    }
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ALARMS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_alarms(output_dir: str | Path) -> list[dict[str, Any]]:
    """
    Read the lines of a run's `alarms.jsonl`, in order; none if it has no such file. A line cut short is left out.
    """
    file = Path(output_dir) / ALARMS_FILE
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def forget_alarms(output_dir: str | Path, step: int) -> None:
    """Drop the lines of steps from `step` on: a run that starts or resumes there makes these steps anew."""
    file = Path(output_dir) / ALARMS_FILE
    if file.is_file():
        kept = [line for line in read_alarms(output_dir) if line["step"] < step]
        replace_file(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
