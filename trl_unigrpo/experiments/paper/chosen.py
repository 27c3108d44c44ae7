"""The search's choice of settings, by the learned reward alone, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...statistics import mean_interval
from .jobs import search_jobs
from .systems import SYSTEMS, Settings, System


def read_entries(file: Path) -> dict[str, dict[str, Any]]:
    """Read system -> what `choose_candidate` returned for it; {} where there is no file."""
    if not file.is_file():
        return {}
    entries = json.loads(file.read_text(encoding="utf-8"))
    if unknown := [name for name in entries if name not in SYSTEMS]:
        raise ValueError(f"{file} has choices for {', '.join(unknown)}, which are no systems. Remove them.")
    return entries


def load_chosen(file: Path) -> dict[str, Settings]:
    """Read system -> the settings that the search chose for it."""
    return {name: entry["settings"] for name, entry in read_entries(file).items()}


def write_entries(file: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write systems in the grid's order, so that a new choice changes its own lines alone."""
    ordered = {name: entries[name] for name in SYSTEMS if name in entries}
    file.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def choose_candidate(
    candidates: Sequence[Settings], rewards: Sequence[Sequence[float]], prompts: Sequence[str]
) -> dict[str, Any]:
    """
    Choose the candidate with the best mean learned reward; of equal ones, the first.

    Args:
        candidates: N settings.
        rewards: (N, prompts), each candidate's learned reward for each prompt.
        prompts: their texts; the same prompt twice counts as one cluster.

    Returns:
        "settings" of the best; "at_edge", those of its settings of which no larger, or no smaller, value was tried;
        "as_good", the indices of candidates whose paired difference from the best has a 95 % interval that reaches 0;
        and "candidates" with the mean reward and its interval of each.
    """
    table = np.array(rewards)
    best = int(table.mean(1).argmax())
    settings = candidates[best]
    tried = {name: [candidate[name] for candidate in candidates] for name in settings}
    differences = [mean_interval(table[best] - row, prompts) for row in table]
    scores = [mean_interval(row, prompts) for row in table]
    return {
        "settings": dict(settings),
        "at_edge": [name for name, value in settings.items() if value in (min(tried[name]), max(tried[name]))],
        "as_good": [index for index, found in enumerate(differences) if index != best and found.low <= 0],
        "candidates": [
            {
                "settings": dict(candidate),
                "reward": round(score.mean, 4),
                "interval": [round(score.low, 4), round(score.high, 4)],
            }
            for candidate, score in zip(candidates, scores, strict=True)
        ],
    }


def choose_from_folders(system: System, output: Path) -> dict[str, Any]:
    """Choose for a system whose candidates have all been run, and say what they were run with."""
    files = [job.folder(output) / "run.json" for job in search_jobs(system)]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    prompts = json.loads((output / "search" / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    mode = system.modes[0]
    rewards = [run["evaluations"][mode]["learned"] for run in runs]
    made_with = {"mode": mode, "split": runs[0]["split"], "num_prompts": len(prompts), "seed": runs[0]["seed"]}
    return {**choose_candidate(system.candidates, rewards, prompts), **made_with, "rollouts": runs[0]["rollouts"]}
