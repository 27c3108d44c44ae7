"""Worth of later rounds: what each does to the images, and other images at equal compute."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from ..monitoring.image_statistics import TWIN_DISTANCE
from ..statistics import FloatArray, mean_interval
from .summary import interval_json, shown


@dataclass(frozen=True)
class Course:
    """
    The course of one prompt through several rounds.

    Attributes:
        rewards: r_1, r_2, .. of the images that stood after each round that it had; None where there is none.
        kept: whether the last of these rounds kept its image.
        changes: how far the image of each round is from the one before, see [`image_distance`]; None where nothing
            was painted or nothing came before.
        before: r_0, of the source image in an edit.
        cluster: prompts that are alike, and so no independent evidence.
    """

    rewards: Sequence[float | None]
    kept: bool = False
    changes: Sequence[float | None] = ()
    before: float | None = None
    cluster: Any = None


def round_report(
    courses: Sequence[Course],
    alone: Sequence[Sequence[float | None]],
    seconds: Mapping[str, float] | None = None,
    perfect: float = 1.0,
) -> dict[str, Any]:
    """
    Compare rounds with each other, and with as many images that know nothing of one another.

    Args:
        courses: N of them.
        alone: of each, rewards of M images of the same prompt that were painted alone: with M as the number of rounds
            this is equal compute, and a refinement that loses to the best of them is none.
        seconds: per prompt, of "rounds" and of "alone".
        perfect: the reward from which on an image needs no other.

    Returns:
        `rounds`, one object a round: `reward`, of the images that stand after it (round 0: the sources); `kept`, share
        of the looks that kept the image; `gain` and `damage`, shares of new images that are better and worse than the
        one before; `unchanged`, that look the same; `false_stop`, share of the looks at an imperfect image that kept
        it; `missed_stop`, of the looks at a perfect one that did not. Then `images`, painted per prompt; the means
        `last`, `best_of_rounds`, `single` and `best_of_alone`, where the reward itself picks the best; and the paired
        differences `last_minus_single`, `best_minus_best_of_alone`. Shares of nothing are None.
    """
    most = max(len(course.rewards) for course in courses)
    clusters = [place if course.cluster is None else course.cluster for place, course in enumerate(courses)]
    stands = np.array([_standing(course, most) for course in courses])  # (N, most + 1)
    others = np.array([[math.nan if x is None else x for x in row] for row in alone], dtype=float)
    # A maximum or a mean of what is not all known is not known.
    best, best_alone, single, last = stands[:, 1:].max(1), others.max(1), others.mean(1), stands[:, -1]
    means = {"last": last, "best_of_rounds": best, "single": single, "best_of_alone": best_alone}
    differences = {"last_minus_single": last - single, "best_minus_best_of_alone": best - best_alone}
    return {
        "rounds": [_round(courses, stands, number, clusters, perfect) for number in range(most + 1)],
        "images": float(np.mean([len(course.rewards) - course.kept for course in courses])),
        "alone": others.shape[1],
        "seconds": dict(seconds or {}),
        **{name: _mean(values, clusters) for name, values in {**means, **differences}.items()},
    }


def _standing(course: Course, most: int) -> list[float]:
    """Give r_0 .. r_most; where a course has ended its last image stands on."""
    rewards = [math.nan if reward is None else reward for reward in (course.before, *course.rewards)]
    return rewards + rewards[-1:] * (most + 1 - len(rewards))


def _round(
    courses: Sequence[Course], stands: FloatArray, number: int, clusters: Sequence[Any], perfect: float
) -> dict[str, Any]:
    reward = {"round": number, "reward": _mean(stands[:, number], clusters)}
    if number == 0:
        return reward
    has = np.array([len(course.rewards) >= number for course in courses])
    kept = np.array([course.kept and len(course.rewards) == number for course in courses])
    before, gain = stands[:, number - 1], stands[:, number] - stands[:, number - 1]
    new = has & ~kept & np.isfinite(gain)
    changes = [course.changes[number - 1] for course in courses if len(course.changes) >= number]
    known = np.array([change for change in changes if change is not None])
    looks = has & np.isfinite(before) & (number > 1)
    return reward | {
        "kept": _share(kept[has]) if number > 1 else None,
        "gain": _share(gain[new] > 0),
        "damage": _share(gain[new] < 0),
        "unchanged": _share(known < TWIN_DISTANCE),
        "false_stop": _share(kept[looks & (before < perfect)]),
        "missed_stop": _share(~kept[looks & (before >= perfect)]),
    }


def _share(flags: Any) -> float | None:
    return float(np.mean(flags)) if len(flags) else None


def _mean(values: FloatArray, clusters: Sequence[Any]) -> dict[str, Any]:
    known = np.isfinite(values)
    chosen = [cluster for cluster, there in zip(clusters, known, strict=True) if there]
    return interval_json(mean_interval(values[known], chosen) if chosen else None)


SHARES = ("kept", "gain", "damage", "unchanged", "false_stop", "missed_stop")


def round_tables(report: Mapping[str, Any]) -> list[Table]:
    """Lay a report out for a terminal: a line for each round, and what rounds are worth at equal compute."""
    by_round = Table("round", "reward (95 % interval)", *(name.replace("_", " ") for name in SHARES))
    for row in report["rounds"]:
        if row["reward"]["mean"] is not None:
            by_round.add_row(str(row["round"]), shown(row["reward"]), *(_percent(row.get(name)) for name in SHARES))
    seconds = report["seconds"]
    worth = Table("images of a prompt", "mean or last", "best", "images", "seconds")
    rows = (
        ("in rounds", "last", "best_of_rounds", f"{report['images']:.2f}", "rounds"),
        ("alone", "single", "best_of_alone", str(report["alone"]), "alone"),
        ("difference", "last_minus_single", "best_minus_best_of_alone", "", ""),
    )
    for name, mean, best, images, key in rows:
        took = f"{seconds[key]:.2f}" if key in seconds else ""
        worth.add_row(name, shown(report[mean]), shown(report[best]), images, took)
    return [by_round, worth]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
