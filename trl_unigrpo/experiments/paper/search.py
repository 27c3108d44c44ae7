"""The search over learning rates, as chosen.json tells it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from .order import position


def read_search(output: Path) -> tuple[dict[str, Any], float]:
    """
    Read system -> its candidates with their validation rewards, and the CPU seconds that the search took.

    The choice is that of `<output>/chosen.json`, else the one that comes with the package, else there is none. The
    seconds are those of the search's run folders, where they are there.
    """
    seconds = 0.0
    for file in sorted(output.glob("search/*/*/run.json")):
        try:
            seconds += json.loads(file.read_text(encoding="utf-8"))["cpu_seconds"]
        except (ValueError, KeyError, TypeError):
            continue  # half written: the search will do it again
    own, shipped = output / "chosen.json", files(__package__) / "chosen.json"
    source = own if own.is_file() else shipped
    if not source.is_file():
        return {}, seconds
    chosen = json.loads(source.read_text(encoding="utf-8"))
    try:
        return {system: _candidates(chosen[system]) for system in sorted(chosen, key=position)}, seconds
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{source} cannot be read ({error!r}): expected system -> settings and candidates, each candidate with "
            "settings and reward."
        ) from error


def _candidates(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "chosen": entry["settings"],
        "at_edge": entry.get("at_edge", []),
        "as_good": entry.get("as_good", []),
        "candidates": [{"settings": of["settings"], "reward": round(of["reward"], 4)} for of in entry["candidates"]],
    }
