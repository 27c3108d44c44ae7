"""The verdict of a run's numbers, whether it worked, and its curves."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics import Interval, mean_interval
from .pages import Curve, Panel
from .run_files import Run, Shown


FEWEST = 5  # values that each end of a curve needs before an interval means anything


@dataclass(frozen=True)
class RunChange:
    """
    A score before and after.

    Attributes:
        gain: the difference with its 95 % interval; None where there is too little to tell.
        fixed: whether both were measured on the same prompts with the same noise.
    """

    before: float
    after: float
    gain: Interval | None
    fixed: bool

    @property
    def verdict(self) -> str:
        """ "better", "worse", "unclear" (the interval holds 0) or "too short"."""
        if self.gain is None or not math.isfinite(self.gain.low):
            return "too short"
        if self.gain.low > 0:
            return "better"
        return "worse" if self.gain.high < 0 else "unclear"


def series(run: Run, name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of a logged metric."""
    rows = [(row["step"], row[name]) for row in run.metrics if isinstance(row.get(name), (int, float))]
    return [step for step, _ in rows], [float(value) for _, value in rows]


def evaluations(run: Run) -> dict[str, list[Shown]]:
    """Sort evaluations by dataset, in the order of steps."""
    found: dict[str, list[Shown]] = {}
    for shown in run.shown:
        if shown.mode == "eval":
            found.setdefault(shown.dataset, []).append(shown)
    return found


def held_out_change(evaluated: Sequence[Shown]) -> RunChange | None:
    """
    Compare rewards of the first evaluation with the last, paired by prompt and place; None without two evaluations.
    """
    if len(evaluated) < 2:
        return None
    before, after = by_place(evaluated[0]), by_place(evaluated[-1])
    pairs = [
        (prompt, old, new)
        for (prompt, place), old in before.items()
        if old is not None and (new := after.get((prompt, place))) is not None
    ]
    if not pairs:
        return None
    prompts, olds, news = zip(*pairs, strict=True)
    gain = mean_interval([new - old for old, new in zip(olds, news, strict=True)], prompts)
    return RunChange(sum(olds) / len(olds), sum(news) / len(news), gain, fixed=True)


def by_place(shown: Shown) -> dict[tuple[str, int], float | None]:
    """Key rewards by (prompt, how often it came before)."""
    seen: Counter[str] = Counter()
    found = {}
    for sample in shown.samples:
        found[sample.prompt, seen[sample.prompt]] = sample.reward
        seen[sample.prompt] += 1
    return found


def training_change(rewards: Sequence[float]) -> RunChange | None:
    """Compare the first tenth of the logged rewards with the last; None without two."""
    rewards = [value for value in rewards if math.isfinite(value)]
    if len(rewards) < 2:
        return None
    tenth = min(max(FEWEST, len(rewards) // 10), len(rewards) // 2)
    first, last = mean_interval(rewards[:tenth]), mean_interval(rewards[-tenth:])
    gain = None
    if tenth >= FEWEST:
        half = math.hypot(first.high - first.mean, last.high - last.mean)
        mean = last.mean - first.mean
        gain = Interval(mean, mean - half, mean + half, 2 * tenth)
    return RunChange(first.mean, last.mean, gain, fixed=False)


def change(run: Run) -> RunChange | None:
    """Compare rewards on fixed prompts where the run was evaluated twice, else the training's own."""
    for evaluated in evaluations(run).values():
        if (found := held_out_change(evaluated)) is not None:
            return found
    return training_change(series(run, "reward")[1])


HELD_OUT = "held-out prompts"
DRIFT = ("flow/velocity_mse", "flow/latent_kl", "flow/latent_kl_flow_grpo")

# Title, metrics (name in the legend -> metrics, of which the first that was logged counts), note.
PANELS: tuple[tuple[str, dict[str, tuple[str, ...]], str], ...] = (
    (
        "Reward",
        {"training": ("reward",), HELD_OUT: ("eval_reward",)},
        "Training paints with noise, evaluation without.",
    ),
    (
        "Reward by round",
        {"first image": ("rounds/reward_1",), "second": ("rounds/reward_2",)},
        "Of the image that stands after it.",
    ),
    (
        "Second looks",
        {"better": ("rounds/better_2",), "worse": ("rounds/worse_2",), "kept": ("rounds/kept_2",)},
        "Shares of the new images that are better or worse, and of looks that keep the first.",
    ),
    ("Drift of the painter", {"drift": DRIFT}, "Distance of its velocities to the reference model's."),
    (
        "Clipped",
        {"image": ("flow/clip_frac",), "text": ("clip_ratio/region_mean",)},
        "Share of ratios outside of the clip range.",
    ),
    ("Entropy of the thinking", {"entropy": ("entropy",)}, "Nats per token; near 0 it always thinks the same."),
    ("Diversity of the images", {"diversity": ("images/diversity",)}, "Mean distance within a group, 0 to 1."),
    ("Length of the thinking", {"length": ("completions/mean_length",)}, "Tokens."),
    ("Gradient norms", {"text": ("grad_norm/text",), "image": ("grad_norm/image",)}, "Before clipping."),
    (
        "No signal",
        {"groups without spread": ("frac_reward_zero_std",), "samples without reward": ("reward/frac_none",)},
        "Shares that teach nothing.",
    ),
)


def panels(run: Run) -> list[Panel]:
    """Collect the curves of one run."""
    found = []
    for title, metrics, note in PANELS:
        names = _with_sets(metrics, [run])
        curves = [_curve(run, options, name if len(names) > 1 else "") for name, options in names.items()]
        found.append(Panel(title, curves, note))
    return found


def panels_of(runs: Sequence[Run], names: Sequence[str]) -> list[Panel]:
    """Collect the same curves of several runs in one chart each."""
    found = []
    for title, metrics, note in PANELS:
        for label, options in _with_sets(metrics, runs).items():
            curves = [_curve(run, options, name) for run, name in zip(runs, names, strict=True)]
            found.append(Panel(f"{title}: {label}" if len(metrics) > 1 else title, curves, note))
    return found


def _with_sets(metrics: dict[str, tuple[str, ...]], runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Add a curve for each evaluation set that has a name."""
    if HELD_OUT not in metrics:
        return metrics
    sets = sorted({name for run in runs for name in evaluations(run) if name})
    return {**metrics, **{f"{HELD_OUT}, {name}": (f"eval_{name}_reward",) for name in sets}}


def _curve(run: Run, options: Sequence[str], name: str) -> Curve:
    for option in options:
        steps, values = series(run, option)
        if values:
            sparse = len(values) < 20
            return Curve(name, steps, values, smooth=1 if sparse else max(2, len(values) // 15))
    return Curve(name, [], [])
