"""The numbers of a folder's lines: overall, by task and by kind of question, with 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..__about__ import versions
from ..reporting.pages.text import readable
from ..statistics import Interval, mean_interval, stratified_interval
from .results import Line


def summarize(settings: Mapping[str, Any], lines: Sequence[Line], label: str = "") -> dict[str, Any]:
    """
    Compute the numbers of a folder's lines.

    Images without a score are in none of the means; how many there are stands beside them. Intervals are over
    prompts: images of one prompt are alike.

    Args:
        settings: of the folder.
        label: the benchmark's title, and the name of its scorer.
    """
    benchmark = settings["benchmark"]
    names = list(dict.fromkeys(name for line in lines for name in line["scores"]))
    metrics = {name: metric_summary(benchmark, lines, name) for name in names}
    unscored = sum(line["reward"] is None for line in lines)
    asked = [question for line in lines for question in line["questions"]]
    unanswered = sum(question["answer"] is None for question in asked)
    main = metrics[names[0]] if names else None
    return {
        "label": label or benchmark["title"],
        "reward": main and main["mean"],
        "ci95": main and main["ci95"],
        "metric": names[0] if names else None,
        "prompts": len({line["index"] for line in lines}),
        "images": len(lines),
        "unscored": unscored,
        "unscored_share": unscored / len(lines) if lines else 0.0,
        "unanswered_share": unanswered / len(asked) if asked else 0.0,
        "metrics": metrics,
        "questions": question_groups(lines),
        "seconds_per_image": sum(line["seconds"] for line in lines) / len(lines) if lines else None,
        "versions": versions(),
        "settings": dict(settings),
    }


def metric_summary(benchmark: Mapping[str, Any], lines: Sequence[Line], name: str) -> dict[str, Any]:
    """Average one score, overall and by task."""
    kept = [line for line in lines if line["scores"].get(name) is not None]
    tasks = list(dict.fromkeys(line["tag"] for line in lines))
    by_task = {task: task_mean(benchmark, [line for line in kept if line["tag"] == task], name) for task in tasks}
    return {
        **interval_json(overall_mean(benchmark, kept, name, tasks)),
        "tasks": {task: interval_json(found) for task, found in by_task.items()},
    }


def task_mean(benchmark: Mapping[str, Any], lines: Sequence[Line], name: str) -> Interval | None:
    """Average the lines that have the score; None of none."""
    if not lines:
        return None
    values, clusters = values_of(lines, name), clusters_of(lines)
    if benchmark["pooled"]:
        return stratified_interval(values, ["all"] * len(lines), clusters, weights=weights_of(lines))
    return mean_interval(values, clusters)


def overall_mean(
    benchmark: Mapping[str, Any], lines: Sequence[Line], name: str, tasks: Sequence[str]
) -> Interval | None:
    """
    Give the benchmark's one number: the mean of all images, of all tasks' means, or of those by their shares.

    None where a task is missing: the others' mean would be another number.
    """
    shares = benchmark["overall"]
    if shares == "mean":
        return task_mean(benchmark, lines, name)
    there = {line["tag"] for line in lines}
    if there != set(shares if isinstance(shares, Mapping) else tasks) or not there:
        return None
    return stratified_interval(
        values_of(lines, name),
        [line["tag"] for line in lines],
        clusters_of(lines),
        shares if isinstance(shares, Mapping) else None,
        weights_of(lines) if benchmark["pooled"] else None,
    )


def values_of(lines: Sequence[Line], name: str) -> list[float]:
    return [line["scores"][name] for line in lines]


def clusters_of(lines: Sequence[Line]) -> list[int]:
    """Number the clusters, in the order of their names."""
    places = {name: place for place, name in enumerate(sorted({line["cluster"] for line in lines}))}
    return [places[line["cluster"]] for line in lines]


def weights_of(lines: Sequence[Line]) -> list[int]:
    """Count the answered questions of each line."""
    return [sum(question["answer"] is not None for question in line["questions"]) for line in lines]


def question_groups(lines: Sequence[Line]) -> dict[str, Any]:
    """Average what the answered questions of each group earned, all of a group alike."""
    groups = dict.fromkeys(question["group"] for line in lines for question in line["questions"])
    found: dict[str, Any] = {}
    for group in groups:
        rows = [
            (question["earned"], line)
            for line in lines
            for question in line["questions"]
            if question["group"] == group and question["earned"] is not None
        ]
        clusters = clusters_of([line for _, line in rows])
        found[group] = interval_json(mean_interval([value for value, _ in rows], clusters) if rows else None)
    return found


def interval_json(interval: Interval | None) -> dict[str, Any]:
    """Write an interval as JSON can hold it; without bounds where there are none."""
    if interval is None:
        return {"mean": None, "ci95": None, "clusters": 0}
    bounds = [interval.low, interval.high]
    return {
        "mean": interval.mean,
        "ci95": bounds if all(map(math.isfinite, bounds)) else None,
        "clusters": interval.n,
    }


def table(summary: Mapping[str, Any]) -> Table:
    """Tabulate the tasks' and the overall scores for the console: the main one with its interval."""
    metrics = summary["metrics"]
    main, *others = metrics.values()
    names = list(metrics)
    found = Table("task", "prompts", title=plain(summary["label"]), title_justify="left")
    found.add_column(f"{names[0]} (95 % interval)", no_wrap=True)
    for name in names[1:]:
        found.add_column(name)
    tasks = list(main["tasks"])
    for place, task in enumerate(tasks):
        number = main["tasks"][task]
        cells = [mean_text(metric["tasks"][task]) for metric in others]
        found.add_row(plain(task), str(number["clusters"]), shown(number), *cells, end_section=place == len(tasks) - 1)
    found.add_row("overall", str(main["clusters"]), shown(main), *map(mean_text, others))
    return found


def plain(text: str) -> Text:
    """Make a user's text fit for the console: without markup and control characters."""
    return Text(readable(text))


def mean_text(number: Mapping[str, Any]) -> str:
    return "-" if number["mean"] is None else f"{number['mean']:.4g}"


def shown(number: Mapping[str, Any]) -> str:
    """Write a number with its interval, as ".712 [.690, .734]"."""
    bounds = number["ci95"]
    return mean_text(number) if bounds is None else f"{number['mean']:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
