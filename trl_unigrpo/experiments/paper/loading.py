"""Run folders: read, checked, and named where something is wrong with them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...shapeworld.grammar import CATEGORIES
from ...statistics import FloatArray
from .order import position


REQUIRED: dict[str, type | tuple[type, ...]] = {
    "system": str,
    "title": str,
    "group": str,
    "seed": int,
    "settings": dict,
    "start": (str, type(None)),
    "rollouts": int,
    "train_cpu_seconds": (int, float),
    "cpu_seconds": (int, float),
    "threads": int,
    "machine": str,
    "date": str,
    "versions": dict,
    "evaluations": dict,
}
SCORES = ("rule", "learned")
"""Each evaluation has lists of these, one number for each prompt."""
MEASURES = ("questions", "strict", "plan", "image_error", "latent_distance")


@dataclass(frozen=True)
class Prompts:
    """The N held-out prompts, the same for all runs, and their categories."""

    texts: list[str]
    categories: list[str]

    @property
    def kinds(self) -> list[str]:
        """The categories that there are, in the grammar's order; unknown ones last."""
        return [of for of in dict.fromkeys((*CATEGORIES, *self.categories)) if of in self.categories]


@dataclass(frozen=True)
class FinishedRun:
    """
    One finished run.

    Attributes:
        name: its folder below the output folder, as in `unigrpo/seed-3`.
        record: run.json.
        history: one row per rollout batch, oldest first; empty where nothing was trained.
        validation: one row per point of its validation, the start first; empty where nothing was trained.
    """

    name: str
    record: dict[str, Any]
    history: list[dict[str, float]]
    validation: list[dict[str, float]] = field(default_factory=list)

    @property
    def system(self) -> str:
        return self.record["system"]

    @property
    def seed(self) -> int:
        return self.record["seed"]

    def scores(self, mode: str, score: str = "rule") -> FloatArray:
        """Take the (N,) numbers of one of `SCORES` of an evaluation."""
        return np.array(self.record["evaluations"][mode][score], dtype=np.float64)


@dataclass(frozen=True)
class Problem:
    """A run that the page leaves out, or a part of one, and why."""

    run: str
    why: str


def read_prompts(output: Path) -> Prompts:
    """Read the prompts of `<output>/prompts.json`."""
    file = output / "prompts.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {output} is not the output folder of `trl-unigrpo paper`.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        texts, categories = list(content["prompts"]), list(content["categories"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}): expected lists `prompts` and `categories`.") from error
    if not texts or len(texts) != len(categories):
        raise ValueError(f"{file} has {len(texts)} prompts and {len(categories)} categories: expected one for each.")
    return Prompts(texts, categories)


def read_runs(output: Path, prompts: Prompts) -> tuple[list[FinishedRun], list[Problem]]:
    """Read the finished runs, in the page's order, and name the folders that hold none that can be used."""
    runs: list[FinishedRun] = []
    problems: list[Problem] = []
    for folder in sorted(output.glob("*/seed-*"), key=_folder_order):
        if folder.parent.name == "search" or not folder.is_dir():
            continue
        name = f"{folder.parent.name}/{folder.name}"
        try:
            run = FinishedRun(name, read_record(folder / "run.json"), [])
            check_record(run.record, folder, len(prompts.texts))
            first = next((other for other in runs if other.system == run.system), run)
            check_settings(run.record, first.record)
        except ValueError as error:
            problems.append(Problem(name, str(error)))
            continue
        try:
            curves = (
                read_json_lines(folder / "history.jsonl", ("rollouts", "cpu_seconds")),
                read_json_lines(folder / "validation.jsonl", ("rollouts", *SCORES, "image_error")),
            )
        except ValueError as error:
            problems.append(Problem(name, f"{error} The run is used, its curves are not."))
            curves = [], []
        runs.append(FinishedRun(name, run.record, *curves))
    return runs, problems


def _folder_order(folder: Path) -> tuple[Any, ...]:
    number = re.fullmatch(r"seed-(\d+)", folder.name)
    return (*position(folder.parent.name), int(number[1]) if number else math.inf, folder.name)


def read_record(file: Path) -> dict[str, Any]:
    """Read run.json as it is. A ValueError says why there is none."""
    if not file.is_file():
        raise ValueError("has no run.json: the run is not finished.")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"run.json is not JSON ({error}): half written? Delete it, and the run is done again."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"run.json holds a {type(record).__name__}, expected an object.")
    return record


def check_record(record: dict[str, Any], folder: Path, num_prompts: int) -> None:
    """Raise a ValueError that says what of a run.json is missing or wrong."""
    for key, kind in REQUIRED.items():
        if key not in record:
            raise ValueError(f"run.json has no {key!r}.")
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise ValueError(f"run.json's {key!r} is {record[key]!r}, expected {_kind_name(kind)}.")
    if (record["system"], f"seed-{record['seed']}") != (folder.parent.name, folder.name):
        raise ValueError(f"run.json is that of {record['system']}/seed-{record['seed']}.")
    for trace in record.get("traces", []):
        if not isinstance(trace, dict) or not {"prompt", "category", "thinking", *SCORES} <= set(trace):
            raise ValueError("run.json's traces are not all objects with prompt, category, thinking and scores.")
    for mode, evaluation in record["evaluations"].items():
        check_scores(mode, evaluation, num_prompts)


def check_scores(mode: str, evaluation: Any, num_prompts: int) -> None:
    """Raise a ValueError that says what of an evaluation is missing or wrong."""
    what = f"run.json's evaluation {mode!r}"
    for name in SCORES:
        values = evaluation.get(name) if isinstance(evaluation, dict) else None
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            raise ValueError(f"{what} has no list of numbers {name!r}.")
        if len(values) != num_prompts:
            raise ValueError(
                f"{what} has {len(values)} numbers {name!r}, expected one for each of the {num_prompts} prompts of "
                "prompts.json."
            )
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"{what} has numbers {name!r} outside of [0, 1].")
    for name in MEASURES:
        if evaluation.get(name) is not None and not _is_number(evaluation[name]):
            raise ValueError(f"{what} has {name} = {evaluation[name]!r}, expected a number.")


def check_settings(record: dict[str, Any], first: dict[str, Any]) -> None:
    """Raise a ValueError if two seeds of one system were not trained alike: their mean would be of nothing."""
    names = ("group", "start", "rollouts")
    mine = {**{name: record[name] for name in names}, **record["settings"], "seed": None}
    other = {**{name: first[name] for name in names}, **first["settings"], "seed": None}
    differing = sorted(key for key in {*mine, *other} if mine.get(key) != other.get(key))
    if differing:
        changes = ", ".join(f"{key} = {mine.get(key)!r} and not {other.get(key)!r}" for key in differing)
        raise ValueError(f"was trained otherwise than seed {first['seed']}: {changes}.")


def read_json_lines(file: Path, needed: Sequence[str]) -> list[dict[str, float]]:
    """Read the rows of a file of JSON lines, each with the needed numbers; none without the file."""
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file.name}, line {number}, is not JSON ({error}).") from error
        if not isinstance(row, dict) or not all(_is_number(row.get(key)) for key in needed):
            raise ValueError(f"{file.name}, line {number}, lacks one of the numbers {', '.join(needed)}.")
        rows.append({key: float(value) for key, value in row.items() if _is_number(value)})
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind_name(kind: type | tuple[type, ...]) -> str:
    kinds: Iterable[type] = kind if isinstance(kind, tuple) else (kind,)
    names = {str: "a string", int: "a whole number", float: "a number", dict: "an object", type(None): "null"}
    return " or ".join(names[kind] for kind in kinds)
