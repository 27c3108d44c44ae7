"""Seconds, denoising evaluations and FLOPs to a held-out score on ShapeWorld: the paper's settings, each lever alone,
and the levers that pay together.

    python benchmarks/time_to_score.py
    python benchmarks/time_to_score.py --sets fast --seeds 0 --split validation     how settings were chosen
    python benchmarks/time_to_score.py --table --figure docs/time_to_score.svg      what was measured, no run

One thread a run, `--jobs` runs at once; seconds are those of the processor, without evaluations. The model is scored
on 1,050 prompts along a run and at its end; a score is reached where the line between two points crosses it. FLOPs are
counted over the first two rollouts. Each run is written as soon as it is done, and not made again.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, set_seed

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.__about__ import versions
from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.experiments.demo.demo import quiet
from trl_unigrpo.shapeworld import load_base, shapeworld_dataset, shapeworld_reward
from trl_unigrpo.shapeworld.evaluate import evaluate_model, group_diversity
from trl_unigrpo.shapeworld.settings import PROMPTS_PER_GENERATION, demo_settings, fast_settings


RESULTS = Path(__file__).parent / "results" / "time_to_score.jsonl"
SCORES = (0.85, 0.90)
POINTS = (0.25, 0.4, 0.55, 0.7, 0.85)
"""Shares of a run after which the model is scored, beside its end."""
PROMPTS = 1050
LINES = {"image_objective": "nft", "matching_samples": 3, "learning_rate": 6e-4, "image_learning_rate": 4e-4}
FEW = {"num_inference_steps": 6}
HALF = {"num_generations": 8, "scout_generations": 16, "per_device_train_batch_size": 8 * PROMPTS_PER_GENERATION}

SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("the paper's method", demo_settings(140)),
    "few_steps": ("6 steps instead of 10", demo_settings(140) | FEW),
    "one_pass": ("one pass instead of two", demo_settings(140) | {"num_iterations": 1, "max_steps": 140}),
    "no_regularizer": ("no regulariser", demo_settings(140) | {"flow_regularizer": "none"}),
    "lines": ("DiffusionNFT, 45 rollouts", demo_settings(45) | LINES),
    "scouts": (
        "8 of 16, scouts of 3 steps",
        demo_settings(140) | HALF | {"scout_num_inference_steps": 3},
    ),
    "thinkings": ("2 images a thinking", demo_settings(140) | {"images_per_thinking": 2}),
    "dead_groups": ("no image forward of dead groups", demo_settings(140) | {"train_dead_images": False}),
    "fast": ("together", fast_settings()),
}
"""Name -> what is changed, and the settings."""


@dataclass(frozen=True)
class Run:
    """One training: a set of settings, its seed, and the split that it is scored on."""

    name: str
    seed: int
    split: str


class Clock(TrainerCallback):
    """Processor seconds of a training, and the model's scores along it, which the clock does not count."""

    def __init__(self, score: Any, rollouts: int):
        self.score, self.rollouts = score, rollouts
        self.at = {max(1, round(share * rollouts)) for share in POINTS}
        self.seconds, self.points = 0.0, []
        self._since = time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        rollout, left = divmod(state.global_step, args.num_iterations)
        if left or (rollout not in self.at and rollout != self.rollouts):
            return
        self.seconds += time.process_time() - self._since
        if rollout in self.at and rollout != self.rollouts:
            reward = float(self.score(PROMPTS).reward.mean())
            self.points.append({"rollout": rollout, "seconds": round(self.seconds, 1), "reward": round(reward, 4)})
            model.train()
        self._since = time.process_time()


def trainer_of(run: Run, model: Any, tokenizer: Any, folder: str, **changes: Any) -> UniGRPOTrainer:
    plain = {"disable_tqdm": True, "gallery_steps": 0, "alarms": "warn"}
    trainer = UniGRPOTrainer(
        model=model,
        reward_funcs=shapeworld_reward,
        args=UniGRPOConfig(output_dir=folder, seed=run.seed, **SETS[run.name][1] | plain | changes),
        train_dataset=shapeworld_dataset("train", None, run.seed),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def flops_of_a_rollout(run: Run, folder: str) -> float:
    """Count the FLOPs of a rollout and its updates, the mean of the first two."""
    model, tokenizer = load_base()
    trainer = trainer_of(run, model, tokenizer, folder, max_steps=2 * SETS[run.name][1].get("num_iterations", 2))
    with count_flops() as counter:
        trainer.train()
    return counter.get_total_flops() / 2


def evaluations_of_a_rollout(args: UniGRPOConfig) -> int:
    """Give how often the velocity of an image is evaluated in painting: images times steps."""
    groups = args.generation_batch_size // args.num_generations
    if args.scout_generations is None:
        return groups * args.num_generations * args.num_inference_steps
    scouts = args.scout_generations * args.scout_num_inference_steps
    exact = args.image_objective != "flow_grpo" and args.scout_num_inference_steps == args.num_inference_steps
    return groups * (scouts + (0 if exact else args.num_generations * args.num_inference_steps))


def measure(run: Run) -> dict[str, Any]:
    """Make a run: its points, seconds, FLOPs, and the scores at its end."""
    torch.set_num_threads(1)
    quiet()
    with TemporaryDirectory() as folder:
        flops = flops_of_a_rollout(run, folder)
        set_seed(run.seed)
        model, tokenizer = load_base()
        score = partial(evaluate_model, model, tokenizer, split=run.split)
        trainer = trainer_of(run, model, tokenizer, folder)
        rollouts = trainer.args.max_steps // trainer.args.num_iterations
        clock = Clock(score, rollouts)
        trainer.add_callback(clock)
        trainer.train()
        last = score(PROMPTS)
    end = {"rollout": rollouts, "seconds": round(clock.seconds, 1), "reward": round(float(last.reward.mean()), 4)}
    return {
        **vars(run),
        "points": [*clock.points, end],
        "error": float(last.error.mean()),
        "distinct": group_diversity(model, tokenizer).distinct_images,
        "evaluations": evaluations_of_a_rollout(trainer.args),
        "flops": flops,
        "settings": SETS[run.name][1],
        "date": str(date.today()),
        "versions": versions(),
    }


def reached(points: Sequence[dict[str, Any]], base: float, score: float) -> float:
    """Give the rollout, as a fraction, after which a score is first reached; NaN if it never is."""
    before, former = 0.0, base
    for point in points:
        if point["reward"] >= score:
            share = (score - former) / (point["reward"] - former)
            return before + share * (point["rollout"] - before)
        before, former = point["rollout"], point["reward"]
    return math.nan


def read(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        yield from map(json.loads, file.read_text("utf-8").splitlines())


def summary(rows: Sequence[dict[str, Any]], base: float) -> dict[str, float]:
    """Average a set's runs over their seeds."""
    found = defaultdict(list)
    for row in rows:
        end = row["points"][-1]
        second = end["seconds"] / end["rollout"]
        for score in SCORES:
            rollouts = reached(row["points"], base, score)
            found[f"seconds_{score}"].append(rollouts * second)
            found[f"evaluations_{score}"].append(rollouts * row["evaluations"])
            found[f"flops_{score}"].append(rollouts * row["flops"])
        found["seconds"].append(end["seconds"])
        found["reward"].append(end["reward"])
        found["error"].append(row["error"])
        found["distinct"].append(row["distinct"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def table(file: Path, split: str, base: float) -> Table:
    """Make the table of all that was measured on a split."""
    runs = defaultdict(list)
    for row in read(file):
        if row["split"] == split:
            runs[row["name"]].append(row)
    shown = Table(
        title=f"{split} prompts, base {base:.3f}; means over seeds; the share of the paper's settings in brackets"
    )
    names = [
        "set",
        "seeds",
        *(f"{what} to {score}" for score in SCORES for what in ("s", "1000 evaluations", "TFLOP")),
    ]
    for name in [*names, "s", "reward", "image error", "distinct"]:
        shown.add_column(name, justify="left" if name == "set" else "right")
    means = {name: summary(runs[name], base) for name in SETS if name in runs}
    today = means.get("paper", {})
    units = {"seconds": 1.0, "evaluations": 1e3, "flops": 1e12}

    def cell(mean: dict[str, float], key: str, unit: float) -> str:
        if math.isnan(mean[key]):
            return "-"
        share = mean[key] / today.get(key, math.nan)
        digits = 1 if unit > 1e3 else 0
        return f"{mean[key] / unit:.{digits}f}" + ("" if math.isnan(share) else f" ({share:.2f})")

    for name, mean in means.items():
        cells = [cell(mean, f"{what}_{score}", unit) for score in SCORES for what, unit in units.items()]
        end = f"{mean['seconds']:.0f}", f"{mean['reward']:.3f}", f"{mean['error']:.4f}", f"{mean['distinct']:.2f}"
        shown.add_row(SETS[name][0], str(len(runs[name])), *cells, *end)
    return shown


def figure(file: Path, split: str, base: float, output: Path) -> None:
    """Draw the held-out score over seconds and over evaluations: a line for each set, the mean of its seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    runs = defaultdict(list)
    for row in read(file):
        if row["split"] == split:
            runs[row["name"]].append(row)
    with matplotlib.rc_context({"svg.hashsalt": "trl-unigrpo", "font.size": 9.5}):
        drawn = Figure(figsize=(9.0, 4.2), layout="constrained")
        axes = drawn.subplots(1, 2, sharey=True)
        for name in SETS:
            if not (rows := runs[name]):
                continue
            main = name in ("paper", "fast")
            score = np.mean([[base, *(point["reward"] for point in row["points"])] for row in rows], axis=0)
            seconds = np.mean([[0.0, *(point["seconds"] for point in row["points"])] for row in rows], axis=0)
            rollouts = np.array([0, *(point["rollout"] for point in rows[0]["points"])])
            for axis, x in zip(axes, (seconds, rollouts * rows[0]["evaluations"] / 1e3), strict=True):
                axis.plot(x, score, marker="o", markersize=3, lw=2.2 if main else 1.0, label=SETS[name][0])
        axes[0].set(xlabel="processor seconds of training", ylabel="reward on held-out prompts")
        axes[1].set(xlabel="thousand denoising evaluations")
        drawn.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        drawn.savefig(output, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS], help="settings to measure")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="prompts of the scores")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file that runs are added to")
    parser.add_argument("--table", action="store_true", help="show what was measured, and make no run")
    parser.add_argument("--figure", type=Path, help="draw the scores over seconds and evaluations into this file")
    given = parser.parse_args()
    console = Console(width=200)
    done = {(row["name"], row["seed"], row["split"]) for row in read(given.output)}
    wanted = [Run(name, seed, given.split) for seed in given.seeds for name in given.sets]
    left = [] if given.table else [run for run in wanted if (run.name, run.seed, run.split) not in done]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool,
        given.output.open("a", encoding="utf-8") as out,
    ):
        for future in as_completed([pool.submit(measure, run) for run in left]):
            row = future.result()
            print(json.dumps(row), file=out, flush=True)
            end = row["points"][-1]
            console.print(f"{row['name']}, seed {row['seed']}: {end['reward']:.3f} in {end['seconds']:.0f} s")
    quiet()
    base = float(evaluate_model(*load_base(), PROMPTS, split=given.split).reward.mean())
    console.print(table(given.output, given.split, base))
    if given.figure is not None:
        figure(given.output, given.split, base, given.figure)


if __name__ == "__main__":
    main()
