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
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from ...__about__ import versions
from ...shapeworld.base import load_base
from ...trainers.unigrpo_config import UniGRPOConfig
from ...trainers.unigrpo_trainer import UniGRPOTrainer
from .edit import EditTask
from .paint import UNIGRPO, Beside, PaintTask
from .read_back import ReadBackTask
from .refine import RefineTask
from .task import Task


DEMOS: dict[str, type[Task[Any]]] = {"paint": PaintTask, "refine": RefineTask, "edit": EditTask}
REWARDS = ("rule", "readback")
METHODS = ("fast", "paper", "both")
WATCHED_ROWS = 48


def watched(rollouts: int) -> dict[str, Any]:
    """Give settings of evaluations on a few validation rows, for the gallery; none changes the training."""
    return {
        "eval_strategy": "steps",
        "eval_steps": max(1, 2 * rollouts // 7),
        "eval_on_start": True,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": WATCHED_ROWS,
    }


class ProgressLine(TrainerCallback):
    """One line: rollouts done, the reward of the last ones, and the time left."""

    def __init__(self, progress: Progress, rollouts: int):
        self.progress = progress
        self.task = progress.add_task("training", total=rollouts, reward="")
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


def choose_task(task: str, reward: str = "rule", method: str = "fast") -> Task[Any]:
    """Make the task of a demo; ValueError if there is none."""
    if task not in DEMOS:
        raise ValueError(f"task={task!r}: expected one of {', '.join(map(repr, DEMOS))}.")
    if reward not in REWARDS or (reward == "readback" and task != "paint"):
        raise ValueError(f"reward={reward!r} with task={task!r}: expected 'rule', or 'readback' with 'paint'.")
    plain = task == "paint" and reward == "rule"
    if method not in METHODS or (method != METHODS[0] and not plain):
        raise ValueError(
            f"method={method!r} with task={task!r} and reward={reward!r}: expected {METHODS[0]!r}, or one of "
            f"{', '.join(map(repr, METHODS[1:]))} where the task is 'paint' and the reward the 'rule'."
        )
    if reward == "readback":
        return ReadBackTask()
    return PaintTask(UNIGRPO) if method == "paper" else DEMOS[task]()


def run_demo(
    output_dir: str | Path = "shapeworld-demo",
    steps: int | None = None,
    seed: int = 0,
    num_prompts: int | None = None,
    task: str = "paint",
    reward: str = "rule",
    method: str = "fast",
) -> dict[str, Any]:
    """
    Train a base model on a task. Writes `summary.json`, `samples_before.jsonl`, `samples_after.jsonl`, `report.html`,
    the training's `gallery.html` and the trained `model/` to `output_dir`.

    Args:
        steps: rollouts of 192 trajectories, each of which makes two optimizer steps; by default the task's number.
        seed: of the training. The held-out prompts and their noise are the same for every seed.
        num_prompts: held-out prompts scored before and after; by default the task's number.
        task: "paint" what a prompt asks for, "refine" it in a second round, or "edit" images.
        reward: the "rule", or "readback", the model's own reading of what it paints.
        method: of painting by the rule: "fast", the "paper"'s, or "both", whose results stand side by side on the
            page; the paper's own page is then in the folder `paper`.

    Returns:
        The numbers of `summary.json`.
    """
    chosen = choose_task(task, reward, method)
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1.")
    quiet()
    output = Path(output_dir)
    given: dict[str, Any] = {"task": task, "reward": reward, "seed": seed}
    if method == "both" and isinstance(chosen, PaintTask):
        paper = train_and_report(PaintTask(UNIGRPO), output / "paper", steps, num_prompts, given | {"method": "paper"})
        chosen.beside = Beside(UNIGRPO.name, *paper)
    given["method"] = "paper" if method == "paper" else "fast"
    return train_and_report(chosen, output, steps, num_prompts, given)[0]


def train_and_report(
    task: Task[Any], output: Path, steps: int | None, num_prompts: int | None, named: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """
    Score the base, train it, score it again, and write all that [`run_demo`] names.

    Args:
        named: what the summary says of the run, the `seed` among it.

    Returns:
        The summary, and the trained model as it was measured.
    """
    rollouts, number, seed = steps or task.rollouts, num_prompts or task.num_rows, named["seed"]
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    model, tokenizer = load_base(seeing=task.seeing)
    console.print(f"Scoring the base model on {number} held-out prompts ...")
    before = task.measure(model, tokenizer, number)
    task.save(before, output / "samples_before.jsonl")

    trainer, train_seconds = train_demo_model(task, model, tokenizer, output, rollouts, seed, console)

    console.print("Scoring the trained model on the same prompts, with the same noise ...")
    after = task.measure(model, tokenizer, number)
    task.save(after, output / "samples_after.jsonl")
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")

    summary = task.summary(before, after) | {
        **named,
        "train_seconds": train_seconds,
        "steps": rollouts,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    history = [row for row in trainer.state.log_history if "reward" in row]
    task.write_report(output / "report.html", before, after, history, summary, trainer.args)
    console.print(task.table(before, after))
    console.print(task.headline(summary))
    console.print(f"Report: {output / 'report.html'}, images of the training: {output / 'gallery.html'}")
    return summary, after


def train_demo_model(
    task: Task[Any],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    rollouts: int,
    seed: int,
    console: Console,
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
            reward_funcs=task.reward,
            args=UniGRPOConfig(
                output_dir=str(output), seed=seed, disable_tqdm=True, **task.settings(rollouts), **watched(rollouts)
            ),
            train_dataset=task.dataset("train", None, seed),
            eval_dataset=task.dataset("validation", WATCHED_ROWS, 0),
            processing_class=tokenizer,
            callbacks=[ProgressLine(progress, rollouts)],
        )
        trainer.remove_callback(PrinterCallback)  # the progress line says it
        started = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - started
