"""The demo: train the tiny model with UniGRPO on ShapeWorld in minutes, and show what changed."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from ...__about__ import versions
from ...shapeworld.base import load_base
from ...shapeworld.dataset import shapeworld_dataset
from ...shapeworld.evaluate import (
    Evaluation,
    evaluate_model,
    group_diversity,
)
from ...shapeworld.grammar import CATEGORIES
from ...shapeworld.settings import demo_settings
from ...shapeworld.verifier import shapeworld_reward
from ...statistics import mean_interval
from ...trainers.unigrpo_config import UniGRPOConfig
from ...trainers.unigrpo_trainer import UniGRPOTrainer
from .report import write_demo_report
from .result import DemoResult, category_rows, latent_drift


WATCHED_PROMPTS = 48


def watched(generations: int) -> dict[str, Any]:
    """Settings of evaluations on a few validation prompts, for the gallery: none of them changes the training."""
    return {
        "eval_strategy": "steps",
        "eval_steps": max(1, 2 * generations // 7),
        "eval_on_start": True,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": WATCHED_PROMPTS,
    }


class ProgressLine(TrainerCallback):
    """One line: rollouts done, the reward of the last ones, and the time left."""

    def __init__(self, progress: Progress, generations: int):
        self.progress = progress
        self.task = progress.add_task("training", total=generations, reward="")
        self.rewards: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "reward" in logs:
            self.rewards.append(logs["reward"])
            self.progress.update(self.task, advance=1, reward=f"reward {np.mean(self.rewards[-5:]):.3f}")


def quiet() -> None:
    """Silence what a user of the demo can't act on: bars of loading, deprecations inside of dependencies."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch|accelerate")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run_demo(
    output_dir: str | Path = "shapeworld-demo", steps: int = 140, seed: int = 0, num_prompts: int = 1050
) -> DemoResult:
    """
    Train the base model. Writes `summary.json`, `samples_before.jsonl`, `samples_after.jsonl`, `report.html`, the
    training's `gallery.html` and the trained `model/` to `output_dir`.

    Args:
        steps: rollouts of 192 trajectories; each makes two optimizer steps.
        seed: of the training. The held-out prompts and their noise are the same for every seed.
        num_prompts: held-out prompts scored before and after.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1.")
    quiet()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    set_seed(seed)
    model, tokenizer = load_base()
    console.print(f"Scoring the base model on {num_prompts} held-out prompts ...")
    before = evaluate_model(model, tokenizer, num_prompts)
    greedy_before = evaluate_model(model, tokenizer, num_prompts, do_sample=False)
    diversity_before = group_diversity(model, tokenizer)
    before.save(output / "samples_before.jsonl")

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[reward]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        trainer = UniGRPOTrainer(
            model=model,
            reward_funcs=shapeworld_reward,
            args=UniGRPOConfig(
                output_dir=str(output), seed=seed, disable_tqdm=True, **demo_settings(steps), **watched(steps)
            ),
            train_dataset=shapeworld_dataset("train", seed=seed),
            eval_dataset=shapeworld_dataset("validation", WATCHED_PROMPTS),
            processing_class=tokenizer,
            callbacks=[ProgressLine(progress, steps)],
        )
        trainer.remove_callback(PrinterCallback)  # the progress line says it
        started = time.perf_counter()
        trainer.train()
        train_seconds = time.perf_counter() - started

    console.print("Scoring the trained model on the same prompts, with the same noise ...")
    after = evaluate_model(model, tokenizer, num_prompts)
    greedy_after = evaluate_model(model, tokenizer, num_prompts, do_sample=False)
    after.save(output / "samples_after.jsonl")
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    diversity_after = group_diversity(model, tokenizer)

    reward = {
        "before": mean_interval(before.reward, before.prompts),
        "after": mean_interval(after.reward, after.prompts),
    }
    gain = mean_interval(after.reward - before.reward, before.prompts)
    greedy_gain = mean_interval(greedy_after.reward - greedy_before.reward, before.prompts)
    summary = {
        "reward_before": reward["before"].mean,
        "reward_after": reward["after"].mean,
        "ci95_before": [reward["before"].low, reward["before"].high],
        "ci95_after": [reward["after"].low, reward["after"].high],
        "gain": gain.mean,
        "ci95_gain": [gain.low, gain.high],
        "greedy_before": float(greedy_before.reward.mean()),
        "greedy_after": float(greedy_after.reward.mean()),
        "greedy_gain": greedy_gain.mean,
        "ci95_greedy_gain": [greedy_gain.low, greedy_gain.high],
        "strict_before": float(before.strict.mean()),
        "strict_after": float(after.strict.mean()),
        "n_eval": num_prompts,
        "picture_error_before": float(before.error.mean()),
        "picture_error_after": float(after.error.mean()),
        "latent_drift": latent_drift(before, after),
        "diversity_before": vars(diversity_before),
        "diversity_after": vars(diversity_after),
        "train_seconds": train_seconds,
        "steps": steps,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    history = [row for row in trainer.state.log_history if "reward" in row]
    result = DemoResult(before, after, greedy_before, greedy_after, history, summary)
    write_demo_report(output / "report.html", result, trainer.args)
    console.print(gain_table(before, after))
    console.print(f"Held-out reward {reward['before']} -> {reward['after']}, gain {gain}")
    console.print(f"Report: {output / 'report.html'}, pictures of the training: {output / 'gallery.html'}")
    return result


def gain_table(before: Evaluation, after: Evaluation) -> Table:
    table = Table("category", "prompts", "before", "after", "gain (95 % interval)")
    for name, old, new, gain in category_rows(before, after):
        table.add_row(
            name, str(old.n), f"{old.mean:.3f}", f"{new.mean:.3f}", str(gain), end_section=name == CATEGORIES[-1]
        )
    return table
