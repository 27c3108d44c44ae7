"""The way from run folders to results.json, the one place from which the page takes its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...monitoring.files import replace_file
from ...statistics import CrossedInterval, holm
from .claims import CLAIMS, COMPARISONS, LEARNED_COMPARISONS, LONG, REFERENCE, Side
from .curves import curve, validation_curve
from .loading import (
    MEASURES,
    SCORES,
    FinishedRun,
    read_prompts,
    read_runs,
)
from .order import GROUP_SYSTEMS, full_grid
from .scores import GridScores
from .search import read_search
from .systems import SYSTEMS, TRACED


Results = dict[str, Any]

COMPARED_WITH: dict[str, Side] = {"table1": REFERENCE, "extras": REFERENCE, "ablations": REFERENCE, "figure5": LONG}
"""Group -> what its systems are compared with, unless they say something else."""
ENOUGH_SEEDS = 5
"""Of fewer, small p-values come up too often by chance."""
COMPARED = ("sampled", "direct", "rounds")
"""The modes that are compared with UniGRPO's sampled one."""


def collect(output: Path, expected: Mapping[str, Sequence[int]] | None = None) -> Results:
    """
    Collect all that the page shows from the run folders below `output`, and write it to `<output>/results.json`.

    The same folders give the same bytes. Runs that cannot be used are named under `problems` and left out.

    Args:
        expected: system -> seeds that the grid has, to say what is missing; the full grid's without it.

    Raises:
        FileNotFoundError: without prompts.json.
        ValueError: without a single run that can be used.
    """
    prompts = read_prompts(output)
    runs, problems = read_runs(output, prompts)
    if not runs:
        reasons = "".join(f"\n  {problem.run}: {problem.why}" for problem in problems)
        raise ValueError(
            f"{output} holds no finished run, so there is nothing to show. Start some: trl-unigrpo paper.{reasons}"
        )
    scores = GridScores(runs, prompts)
    search, search_seconds = read_search(output)
    systems = {name: system_summary(name, scores) for name in scores.systems}
    correct_p_values(systems)
    results: Results = {
        "prompts": {
            "number": len(prompts.texts),
            "different": len(set(prompts.texts)),
            "categories": {name: prompts.categories.count(name) for name in prompts.kinds},
        },
        "systems": systems,
        "comparisons": {
            score: {
                f"{side_name(left)} - {side_name(right)}": interval_record(difference)
                for left, right in pairs
                if (difference := scores.difference(left, right, score))
            }
            for score, pairs in (("rule", COMPARISONS), ("learned", LEARNED_COMPARISONS))
        },
        "curves": {name: found for name, of in scores.by_system.items() if (found := curve(of, scores.starts(name)))},
        "validation": {
            name: found
            for name in GROUP_SYSTEMS["figure5"]
            if (found := validation_curve(scores.by_system.get(name, [])))
        },
        "figure4": guidance_summary(systems),
        "figure5": regularizer_summary(systems, scores),
        "search": search,
        "traces": shown_traces(scores),
        "machine": machine_summary(runs, search_seconds),
        "missing": missing(scores, full_grid() if expected is None else expected),
        "problems": [asdict(problem) for problem in problems],
    }
    results["claims"] = [
        {"id": claim.id, "text": claim.text, "where": claim.where, **claim.judge(results)._asdict()}
        for claim in CLAIMS
    ]
    write_json(output / "results.json", results)
    return results


def side_name(side: tuple[str, str]) -> str:
    """Write a system and the mode in which it is evaluated as one word."""
    return "/".join(side)


def system_summary(system: str, scores: GridScores) -> dict[str, Any]:
    """Summarize one system: what it is, what it cost with the stage before it, what it scored in each mode."""
    runs = scores.runs(system)
    record = runs[0].record
    starts = scores.starts(system)
    seconds = [mean_or_none(run.record["train_cpu_seconds"] for run in stage) or 0.0 for stage in (starts, runs)]
    diversities = [run.record["diversity"] for run in runs if run.record.get("diversity")]
    modes = list(dict.fromkeys(mode for run in runs for mode in run.record["evaluations"]))
    return {
        "title": record["title"],
        "group": "hidden" if system in GROUP_SYSTEMS["hidden"] else record["group"],
        "start": record["start"] or "base",
        "seeds": [run.seed for run in runs],
        "trained": scores.trained(system),
        "rollouts": sum(run.record["rollouts"] for run in (*starts[:1], runs[0])),
        "stopped": [
            significant(point["rollouts"] / run.record["rollouts"], 3)
            for run in runs
            if (point := run.record.get("chosen_point"))
        ],
        "train_cpu_seconds": round(sum(seconds), 1),
        "clip_frac": significant(
            mean_or_none(row["clip_frac"] for run in runs for row in run.history if "clip_frac" in row), 3
        ),
        "settings": {key: value for key, value in sorted(record["settings"].items()) if key != "seed"},
        "modes": {mode: mode_summary(system, mode, scores) for mode in modes},
        "diversity": {
            key: significant(mean_or_none(of[key] for of in diversities), 4)
            for key in (diversities[0] if diversities else {})
            if all(key in of for of in diversities)
        },
    }


def mode_summary(system: str, mode: str, scores: GridScores) -> dict[str, Any]:
    """Summarize one system in one mode; what is no interval is a mean over seeds."""
    evaluations = [run.record["evaluations"][mode] for run in scores.runs(system, mode)]
    measures = {key: [of[key] for of in evaluations if of.get(key) is not None] for key in MEASURES}
    errors = measures["image_error"]
    own_interval = evaluations[0].get("image_error_interval")
    means = {score: scores.mean(system, mode, score=score) for score in SCORES}
    summary: dict[str, Any] = {
        "seeds": [run.seed for run in scores.runs(system, mode)],
        **{score: interval_record(mean) if mean else None for score, mean in means.items()},
        **{key: significant(mean_or_none(values), 4) for key, values in measures.items()},
        "image_error_range": [significant(of, 4) for of in (min(errors), max(errors))] if len(errors) > 1 else None,
        "image_error_interval": [significant(of, 4) for of in own_interval] if own_interval else None,
        "categories": {
            category: interval_record(found) if (found := scores.mean(system, mode, category)) else None
            for category in scores.prompts.kinds
        },
    }
    other = compared_with(system, mode, scores)
    if other:
        difference = scores.difference((system, mode), other)
        summary["difference"] = interval_record(difference) | {"to": list(other)} if difference else None
    return summary


def compared_with(system: str, mode: str, scores: GridScores) -> Side | None:
    """Name the system, and its mode, that one is compared with in its table, None for nothing."""
    known = SYSTEMS.get(system)
    against = known.against if known else None
    other = COMPARED_WITH.get(scores.runs(system)[0].record["group"])
    if mode not in COMPARED or other is None or system in (other[0], *GROUP_SYSTEMS["hidden"]):
        return None
    if against is None:
        return other
    return (against, mode) if mode in SYSTEMS[against].modes else None


def correct_p_values(systems: Mapping[str, Any]) -> None:
    """Add `p_holm` to the differences of each group, a family of p-values, where all have `ENOUGH_SEEDS`."""
    for group in COMPARED_WITH:
        members = [
            mode["difference"]
            for of in systems.values()
            for mode in of["modes"].values()
            if of["group"] == group and mode.get("difference")
        ]
        if any(of["seeds"] < ENOUGH_SEEDS for of in members):
            continue
        for member, corrected in zip(members, holm([of["p"] for of in members]), strict=True):
            member["p_holm"] = significant(corrected, 3)


def guidance_summary(systems: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compute Figure 4: guidance in training and in evaluation; None without a run of either."""
    trained = {name: systems[name] for name in ("guidance_off", "guidance_on") if name in systems}
    if not trained:
        return None
    return {
        "guidance_scale": next(
            (
                of["settings"]["guidance_scale"]
                for of in trained.values()
                if of["settings"].get("guidance_scale", 1) != 1
            ),
            None,
        ),
        "cells": {
            name: {mode: of["modes"][mode]["rule"] for mode in ("sampled", "guided") if mode in of["modes"]}
            for name, of in trained.items()
        },
    }


def regularizer_summary(systems: Mapping[str, Any], scores: GridScores) -> dict[str, Any]:
    """Compute Figure 5: the ends of the long runs; the image error also as a multiple of the velocity MSE's."""
    shown = [name for name, of in systems.items() if of["group"] == "figure5" or name == "base"]
    keys = ("rule", "learned", "questions", "image_error", "latent_distance")
    return {
        name: {
            "title": systems[name]["title"],
            **{key: systems[name]["modes"]["sampled"][key] for key in keys},
            "distinct": systems[name]["diversity"].get("distinct_images"),
            "image_error_ratio": error_ratio(scores, name) if name not in ("base", LONG[0]) else None,
        }
        for name in shown
        if "sampled" in systems[name]["modes"]
    }


def error_ratio(scores: GridScores, system: str) -> dict[str, Any] | None:
    """
    Divide the image error by that with the velocity MSE: geometric mean over common seeds, t interval of its log.

    With one seed there is a ratio and no interval.
    """
    errors = [
        {run.seed: run.record["evaluations"]["sampled"].get("image_error") for run in scores.runs(name, "sampled")}
        for name in (system, LONG[0])
    ]
    logs = [math.log(errors[0][seed] / other) for seed, other in errors[1].items() if other and errors[0].get(seed)]
    if not logs:
        return None
    low = high = None
    if len(logs) > 1:
        from scipy.stats import ttest_1samp  # crossed_interval has said already if it is missing

        low, high = (math.exp(end) for end in ttest_1samp(logs, 0.0).confidence_interval(0.95))
    ratio = {"ratio": math.exp(sum(logs) / len(logs)), "low": low, "high": high}
    return {**{key: significant(value, 4) for key, value in ratio.items()}, "seeds": len(logs)}


def shown_traces(scores: GridScores) -> list[dict[str, Any]]:
    """
    List the fixed prompts with the thinking, the scores and the place of the image of each of `TRACED`.

    `strip` is the file below the output folder, `index` the image's place in it.
    """
    rows: dict[str, dict[str, Any]] = {}
    for system in TRACED:
        run = next((run for run in scores.runs(system) if run.record.get("traces")), None)
        for index, trace in enumerate(run.record["traces"] if run else []):
            row = rows.setdefault(trace["prompt"], {"prompt": trace["prompt"], "category": trace["category"]})
            row.setdefault("samples", {})[system] = {
                "thinking": trace["thinking"],
                **{score: significant(trace[score], 4) for score in SCORES},
                "image_error": significant(trace.get("image_error"), 4),
                "strip": f"{run.name}/strip.png" if run else None,
                "index": index,
            }
    return list(rows.values())


def machine_summary(runs: Sequence[FinishedRun], search_seconds: float) -> dict[str, Any]:
    """Say where and when the runs were made and what they cost."""
    records = [run.record for run in runs]
    packages = sorted({package for record in records for package in record["versions"]})
    return {
        "machines": sorted({record["machine"] for record in records}),
        "threads": sorted({record["threads"] for record in records}),
        "dates": [min(record["date"] for record in records), max(record["date"] for record in records)],
        "versions": {
            package: sorted({str(record["versions"][package]) for record in records if package in record["versions"]})
            for package in packages
        },
        "runs": len(runs),
        "train_cpu_seconds": round(sum(record["train_cpu_seconds"] for record in records)),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records)),
        "search_cpu_seconds": round(search_seconds),
    }


def missing(scores: GridScores, expected: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """
    Find what the grid has and the folders do not.

    Returns:
        `seeds`: system -> {"expected", "missing"}, lists of seeds, where some are missing; `modes`: system -> mode ->
        seeds that lack an evaluation which other seeds of the system have.
    """
    seeds = {
        system: {"expected": list(wanted), "missing": [seed for seed in wanted if seed not in found]}
        for system, wanted in expected.items()
        for found in [{run.seed for run in scores.runs(system)}]
        if not found.issuperset(wanted)
    }
    modes: dict[str, dict[str, list[int]]] = {}
    for system, runs in scores.by_system.items():
        for mode in dict.fromkeys(mode for run in runs for mode in run.record["evaluations"]):
            without = [run.seed for run in runs if mode not in run.record["evaluations"]]
            if without:
                modes.setdefault(system, {})[mode] = without
    return {"seeds": seeds, "modes": modes}


def interval_record(interval: CrossedInterval) -> dict[str, Any]:
    """Round an interval for results.json. `seeds` is 1 where it is over prompts alone."""
    return {
        "mean": round(interval.mean, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "p": significant(interval.p_value, 3),
        "seeds": interval.seeds,
        "prompts": interval.prompts,
    }


def mean_or_none(values: Iterable[float]) -> float | None:
    """Average the values; None of nothing."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def significant(value: float | None, digits: int) -> float | None:
    """Round to a number of significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    replace_file(file, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
