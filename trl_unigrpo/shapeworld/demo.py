"""The demo: train the tiny model with UniGRPO on ShapeWorld in minutes, and show what changed."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from trl_unigrpo.evaluation.statistics import Interval, mean_interval
from trl_unigrpo.shapeworld.base import load_base
from trl_unigrpo.shapeworld.dataset import shapeworld_dataset
from trl_unigrpo.shapeworld.evaluate import (
    MAX_COMPLETION_LENGTH,
    NUM_INFERENCE_STEPS,
    Evaluation,
    evaluate_model,
    group_diversity,
)
from trl_unigrpo.shapeworld.grammar import CATEGORIES
from trl_unigrpo.shapeworld.render import IMAGE_SIZE
from trl_unigrpo.shapeworld.report import write_report
from trl_unigrpo.shapeworld.verifier import shapeworld_reward
from trl_unigrpo.unigrpo_config import UniGRPOConfig
from trl_unigrpo.unigrpo_trainer import UniGRPOTrainer
from trl_unigrpo.versions import versions


PROMPTS_PER_GENERATION = 12
WATCHED_PROMPTS = 48


def demo_settings(generations: int = 140) -> dict[str, Any]:
    """
    The demo's settings: the paper's, but for sizes and learning rates, which were chosen on validation prompts.

    Args:
        generations: rollouts of 12 prompts x 16 trajectories, each trained on twice.
    """
    return {
        "max_steps": 2 * generations,
        "num_generations": 16,
        "per_device_train_batch_size": 16 * PROMPTS_PER_GENERATION,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "image_size": IMAGE_SIZE,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "eval_num_inference_steps": NUM_INFERENCE_STEPS,
        "learning_rate": 3e-4,
        "image_learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


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


@dataclass
class DemoResult:
    """What the demo measured; `before` and `after` are paired, prompt by prompt and noise by noise."""

    before: Evaluation
    after: Evaluation
    greedy_before: Evaluation
    greedy_after: Evaluation
    history: list[dict[str, float]]
    summary: dict[str, Any]


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
    write_report(output / "report.html", result, trainer.args)
    console.print(category_table(before, after))
    console.print(f"Held-out reward {reward['before']} -> {reward['after']}, gain {gain}")
    console.print(f"Report: {output / 'report.html'}, pictures of the training: {output / 'gallery.html'}")
    return result


def latent_drift(before: Evaluation, after: Evaluation) -> float:
    """How far the spread of the latents moved: |std after / std before - 1|."""
    return abs(float(after.latents.std() / before.latents.std()) - 1)


def category_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, Interval, Interval, Interval]]:
    """Category, reward before, after, and the paired gain; the last row is all of them."""
    categories, prompts = np.array(before.categories), np.array(before.prompts)
    rows = []
    for name in (*CATEGORIES, "all"):
        chosen = np.ones(len(categories), dtype=bool) if name == "all" else categories == name
        if chosen.any():
            old, new, of = before.reward[chosen], after.reward[chosen], prompts[chosen]
            rows.append((name, mean_interval(old, of), mean_interval(new, of), mean_interval(new - old, of)))
    return rows


def category_table(before: Evaluation, after: Evaluation) -> Table:
    table = Table("category", "prompts", "before", "after", "gain (95 % interval)")
    for name, old, new, gain in category_rows(before, after):
        table.add_row(
            name, str(old.n), f"{old.mean:.3f}", f"{new.mean:.3f}", str(gain), end_section=name == CATEGORIES[-1]
        )
    return table
