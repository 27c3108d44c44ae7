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
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
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
from ...trainers.unigrpo_config import UniGRPOConfig
from ...trainers.unigrpo_trainer import UniGRPOTrainer
from .report import write_demo_report
from .result import DemoResult, Measured, category_rows, summary_of


WATCHED_PROMPTS = 48


def watched(generations: int) -> dict[str, Any]:
    """Give settings of evaluations on a few validation prompts, for the gallery; none changes the training."""
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
    output, console = Path(output_dir), Console()
    output.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    model, tokenizer = load_base()
    console.print(f"Scoring the base model on {num_prompts} held-out prompts ...")
    before = measure(model, tokenizer, num_prompts)
    before.sampled.save(output / "samples_before.jsonl")

    trainer, train_seconds = train_demo_model(model, tokenizer, output, steps, seed, console)

    console.print("Scoring the trained model on the same prompts, with the same noise ...")
    after = measure(model, tokenizer, num_prompts)
    after.sampled.save(output / "samples_after.jsonl")
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")

    summary = summary_of(before, after) | {
        "train_seconds": train_seconds,
        "steps": steps,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    history = [row for row in trainer.state.log_history if "reward" in row]
    result = DemoResult(before.sampled, after.sampled, before.greedy, after.greedy, history, summary)
    write_demo_report(output / "report.html", result, trainer.args)
    show(result, output, console)
    return result


def measure(model: Any, tokenizer: PreTrainedTokenizerBase, num_prompts: int) -> Measured:
    """Score a model with sampled and with greedy thinkings, and see how much its samples differ."""
    return Measured(
        sampled=evaluate_model(model, tokenizer, num_prompts),
        greedy=evaluate_model(model, tokenizer, num_prompts, do_sample=False),
        diversity=group_diversity(model, tokenizer),
    )


def train_demo_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, output: Path, generations: int, seed: int, console: Console
) -> tuple[UniGRPOTrainer, float]:
    """Train the model in place, with a line of progress; returns the trainer and the seconds that it took."""
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
                output_dir=str(output),
                seed=seed,
                disable_tqdm=True,
                **demo_settings(generations),
                **watched(generations),
            ),
            train_dataset=shapeworld_dataset("train", seed=seed),
            eval_dataset=shapeworld_dataset("validation", WATCHED_PROMPTS),
            processing_class=tokenizer,
            callbacks=[ProgressLine(progress, generations)],
        )
        trainer.remove_callback(PrinterCallback)  # the progress line says it
        started = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - started


def show(result: DemoResult, output: Path, console: Console) -> None:
    """Print what changed, and where the pages lie."""
    _, old, new, gain = category_rows(result.before, result.after)[-1]
    console.print(gain_table(result.before, result.after))
    console.print(f"Held-out reward {old} -> {new}, gain {gain}")
    console.print(f"Report: {output / 'report.html'}, images of the training: {output / 'gallery.html'}")


def gain_table(before: Evaluation, after: Evaluation) -> Table:
    """Tabulate the rewards of each category, before and after, for the console."""
    table = Table("category", "prompts", "before", "after", "gain (95 % interval)")
    for name, old, new, gain in category_rows(before, after):
        table.add_row(
            name, str(old.n), f"{old.mean:.3f}", f"{new.mean:.3f}", str(gain), end_section=name == CATEGORIES[-1]
        )
    return table
