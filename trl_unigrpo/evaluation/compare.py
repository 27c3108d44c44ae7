"""Two folders of results, image by image: who is better, by how much, and is that more than chance?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..statistics import holm, stratified_interval, t_interval
from .results import (
    Line,
    differences,
    read_lines,
    read_settings,
)
from .summary import (
    clusters_of,
    plain,
    shown,
    weights_of,
)


@dataclass(frozen=True)
class Pair:
    """The same prompt's same sample in two folders."""

    a: Line
    b: Line

    @property
    def difference(self) -> float:
        """Reward of B's image minus that of A's."""
        return self.b["reward"] - self.a["reward"]


def compare_folders(first: str | Path, second: str | Path) -> tuple[dict[str, Any], list[Pair]]:
    """
    Compare two folders in pairs: B minus A, over prompts that both painted and scored.

    Differences are averaged as the benchmark averages scores. Intervals and p-values are Student's, over prompts:
    with one image of each, the paired t-test. P-values of tasks are corrected for their number (Holm).

    Raises:
        ValueError: if they are of different benchmarks, or of different prompts under one name, or share fewer than
            two prompts.
        ImportError: without scipy.
    """
    a, b = Path(first), Path(second)
    settings = read_settings(a), read_settings(b)
    benchmark = settings[0]["benchmark"]
    if benchmark["name"] != settings[1]["benchmark"]["name"]:
        raise ValueError(
            f"{a} is of {benchmark['title']}, {b} of {settings[1]['benchmark']['title']}: expected one benchmark."
        )
    pairs, alone = match(read_lines(a), read_lines(b))
    tasks = list(dict.fromkeys(pair.a["tag"] for pair in pairs))
    by_task = {
        task: difference(benchmark, [pair for pair in pairs if pair.a["tag"] == task]) | {"p_holm": None}
        for task in tasks
    }
    tested = [task for task in tasks if by_task[task]["p_value"] is not None]
    for task, corrected in zip(tested, holm([by_task[task]["p_value"] for task in tested]), strict=True):
        by_task[task]["p_holm"] = corrected
    whole = difference(benchmark, pairs, overall=True)
    if whole["clusters"] < 2:
        raise ValueError(f"{a} and {b} have {whole['clusters']} scored prompts in common: expected at least two.")
    report = {
        "benchmark": benchmark["title"],
        "a": str(a),
        "b": str(b),
        "overall": whole,
        "tasks": by_task,
        "images": len(pairs),
        "images_of_one_alone": alone,
        "different_settings": other_settings(*settings),
    }
    return report, pairs


def other_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """List what differs between two results but for the models: dotted name -> the values of A and B."""
    return {
        name: {"a": old, "b": new}
        for name, (old, new) in differences(first, second).items()
        if not name.startswith("model.") or name == "model.dtype"
    }


def match(first: Sequence[Line], second: Sequence[Line]) -> tuple[list[Pair], int]:
    """Pair the lines that both have a score; returns the pairs and the number of the other lines."""
    others = {(line["key"], line["sample"]): line for line in second}
    pairs = []
    for line in first:
        other = others.get((line["key"], line["sample"]))
        if other is None:
            continue
        if other["prompt"] != line["prompt"]:
            raise ValueError(
                f"The prompt {line['key']!r} is {line['prompt'][:80]!r} in one and {other['prompt'][:80]!r} in the "
                "other: expected results of the same prompts."
            )
        if line["reward"] is not None and other["reward"] is not None:
            pairs.append(Pair(line, other))
    return pairs, len(first) + len(second) - 2 * len(pairs)


def difference(benchmark: Mapping[str, Any], pairs: Sequence[Pair], overall: bool = False) -> dict[str, Any]:
    """
    Average B minus A, with interval and p-value; with fewer than two prompts in a task, the mean alone.

    Args:
        overall: weigh the tasks as the benchmark does; otherwise all pairs alike.
    """
    lines = [pair.a for pair in pairs]
    empty = {"a": None, "b": None, "mean": None, "ci95": None, "p_value": None, "clusters": 0}
    if not pairs:
        return empty
    stratified = overall and benchmark["overall"] != "mean"
    shares = benchmark["overall"] if stratified and isinstance(benchmark["overall"], Mapping) else None
    strata = [line["tag"] if stratified else "all" for line in lines]
    if shares is not None and set(strata) != set(shares):
        return empty | {"clusters": len(set(clusters_of(lines)))}
    weights = weights_of(lines) if benchmark["pooled"] else None

    def mean(values: list[float]) -> Any:
        return stratified_interval(values, strata, clusters_of(lines), shares, weights)

    found = mean([pair.difference for pair in pairs])
    sides = {
        "a": mean([pair.a["reward"] for pair in pairs]).mean,
        "b": mean([pair.b["reward"] for pair in pairs]).mean,
    }
    number = {**sides, "mean": found.mean, "ci95": None, "p_value": None, "clusters": found.n}
    freedom = found.n - len(set(strata))
    if freedom < 1 or found.error == float("inf"):
        return number
    low, high, p_value = t_interval(found, freedom)
    return number | {"ci95": [low, high], "p_value": p_value}


def comparison_table(report: Mapping[str, Any]) -> Table:
    """Tabulate a comparison by task, with the difference, its interval and its corrected p-value."""
    table = Table(
        "task",
        "prompts",
        "A",
        "B",
        "B - A (95 % interval)",
        "p, Holm",
        title=report["benchmark"],
        title_justify="left",
    )
    tasks = list(report["tasks"].items())
    for place, (task, number) in enumerate(tasks):
        table.add_row(plain(task), *_cells(number, number["p_holm"]), end_section=place == len(tasks) - 1)
    table.add_row("overall", *_cells(report["overall"], report["overall"]["p_value"]))
    return table


def _cells(number: Mapping[str, Any], p_value: float | None) -> list[str]:
    means = ["-" if number[side] is None else f"{number[side]:.3f}" for side in ("a", "b")]
    return [str(number["clusters"]), *means, shown(number), "-" if p_value is None else f"{p_value:.2g}"]
