"""The trainer of a system of the grid: its settings in full, and the public trainer that they configure."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from ...rewards import ReadBackReward
from ...shapeworld import (
    demo_settings,
    image_error,
    preference_reward,
    shapeworld_dataset,
    shapeworld_reward,
    soft_preference_reward,
)
from ...shapeworld.corpus import NO_ERRORS, pretraining_corpus
from ...trainers.refl_trainer import ReFLConfig, ReFLTrainer
from ...trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
from ...trainers.unigrpo_config import UniGRPOConfig
from ...trainers.unigrpo_trainer import UniGRPOTrainer
from .numbers import digits
from .systems import Scale, Settings, System
from .validation import VALIDATION_POINTS, PointScores, Validation, validation_steps


NO_SETTING_OF = {
    "sft": ("corpus_errors", "guidance_scale", "eval_guidance_scale"),
    "refl": (),
    "unigrpo": ("eval_guidance_scale",),
}
"""Entries of a run's settings that speak of its data and of how it is scored, not of its trainer."""

IMAGES_PER_ROLLOUT = 192
CORPUS_SEED = 1000
"""Added to a run's seed: the base model was trained on the corpus of seed 0."""

LOGGED = {
    "reward": "reward",
    "rewards/shapeworld_reward/mean": "rule",
    "rewards/image_error_reward/mean": "image_error",
    "flow/velocity_mse": "velocity_mse",
    "flow/latent_kl": "latent_kl",
    "flow/clip_frac": "clip_frac",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "loss/text": "text_loss",
    "loss/flow": "flow_loss",
}
"""The trainers' metrics -> their names in `history.jsonl`."""


def method_settings(method: str, generations: int) -> dict[str, Any]:
    """Give what all systems of a method share. 192 images per generation: one rollout, or two batches of 96."""
    demo = {**demo_settings(generations), "lr_scheduler_type": "constant"}  # the rates were searched without decay
    if method == "unigrpo":
        return {**demo, "reward_weights": [1.0, 0.0, 0.0]}
    shared = {name: demo[name] for name in ("lr_scheduler_type", "logging_steps", "save_strategy", "report_to")}
    shared |= {"per_device_train_batch_size": demo["per_device_train_batch_size"] // 2, "max_steps": 2 * generations}
    if method == "refl":
        sampling = ("max_completion_length", "num_inference_steps", "image_size", "adam_beta2")
        return {**shared, **{name: demo[name] for name in sampling}}
    # The base model was trained with these.
    times = {"noise_draws": 3, "timestep_sampling": "uniform", "timestep_shift": 4.0}
    return {**shared, **times, "adam_beta2": 0.98, "weight_decay": 0.01}


def run_settings(
    system: System, chosen: Mapping[str, Settings], scale: Scale, candidate: int | None = None
) -> dict[str, Any]:
    """
    List every setting of a run, as JSON has them; {} for the base model.

    Args:
        chosen: the search's choice for each of `system.chosen`.
        candidate: the index of the candidate to try instead of the choice for the system itself.

    Raises:
        ValueError: where a choice is missing.
    """
    if system.method == "none":
        return {}
    needed = system.chosen if candidate is None else system.takes
    if missing := [name for name in needed if name not in chosen]:
        raise ValueError(
            f"{system.name} needs the search's choice for {', '.join(missing)}. Make it first: "
            f"trl-unigrpo paper --search --only {','.join(missing)}"
        )
    whole = scale.generations * system.length
    generations = {"whole": whole, "first half": whole // 2, "second half": whole - whole // 2}
    settings = method_settings(system.method, generations[system.part])
    for name in needed:
        settings |= chosen[name]
    settings |= {name: value() if callable(value) else value for name, value in system.settings.items()}
    if candidate is not None:
        settings |= system.candidates[candidate]
    if system.method == "unigrpo":  # each rollout makes `num_iterations` steps
        settings["max_steps"] = generations[system.part] * passes(settings)
    return json.loads(json.dumps(settings))


def passes(settings: Settings) -> int:
    """Count the optimizer steps per rollout batch of a run of `UniGRPOTrainer`; 1 of any other."""
    return settings.get("num_iterations", 2) if "num_generations" in settings else 1


def rollouts(settings: Settings) -> int:
    """Count the images that a run sees."""
    return round(settings["max_steps"] * images_per_step(settings)) if settings else 0


def images_per_step(settings: Settings) -> float:
    """Count the images that a run sees for each optimizer step; of a pool of scouts, all."""
    pool = settings.get("scout_generations", settings.get("num_generations", 1)) / settings.get("num_generations", 1)
    return settings["per_device_train_batch_size"] * pool / passes(settings)


def configuration(method: str) -> type:
    """Name the class of a method's configuration."""
    return {"sft": UnifiedSFTConfig, "refl": ReFLConfig, "unigrpo": UniGRPOConfig}[method]


def trainer_arguments(system: System, settings: Settings, output_dir: str, seed: int) -> Any:
    """Make the configuration of a run. Raises a ValueError for settings that the trainer doesn't know or refuses."""
    known = {name: value for name, value in settings.items() if name not in NO_SETTING_OF[system.method]}
    if system.method == "unigrpo":  # all see as many images, whatever becomes of them
        known |= {"alarms": "off", "gallery_steps": 0}
    try:
        return configuration(system.method)(output_dir=output_dir, seed=seed, disable_tqdm=True, **known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{system.name}: {error}") from error


def image_error_reward(
    prompts: Sequence[Any], completions: Sequence[Any], images: Sequence[Image.Image], **kwargs: Any
) -> list[float]:
    """Give image errors as a reward function of weight 0: it is logged, and nothing is trained on it."""
    return image_error(images).tolist()


class HistoryFile(TrainerCallback):
    """
    A callback that writes one line of JSON per rollout batch as soon as it has been trained on.

    A line has `LOGGED`, "rollouts" (images so far) and "cpu_seconds" (of training so far), to five digits. Of the
    numbers that each pass logs it has those of the last pass: in the first, the ratio is 1. The seconds are without
    those of the validation.
    """

    def __init__(self, file: Path, settings: Settings, validation: Validation | None = None):
        self.file, self.validation = file, validation
        self.passes, self.images = passes(settings), images_per_step(settings)
        self.row: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.process_time()
        self.file.write_text("", encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.row |= {LOGGED[name]: value for name, value in (logs or {}).items() if name in LOGGED}
        if state.global_step % self.passes or not self.row:
            return
        # They stand in the order of LOGGED; what has no value, such as the entropy of no thinking, is left out.
        known = {name: self.row[name] for name in LOGGED.values() if math.isfinite(self.row.get(name, math.nan))}
        rollouts = round(state.global_step * self.images)
        validated = self.validation.cpu_seconds if self.validation else 0.0
        row = {"rollouts": rollouts, **known, "cpu_seconds": time.process_time() - self.started - validated}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({name: digits(value) for name, value in row.items()}) + "\n")
        self.row = {}


def make_validation(
    system: System, settings: Settings, folder: Path, model: torch.nn.Module, score: Callable[[], PointScores]
) -> Validation:
    """Make the callback that writes `validation.jsonl` and stops early, if the system does."""
    seen = rollouts(settings)
    steps = validation_steps(settings["max_steps"], seen // IMAGES_PER_ROLLOUT, VALIDATION_POINTS * system.length)
    return Validation(
        folder / "validation.jsonl", model, score, steps, images_per_step(settings), system.early_stopping
    )


def make_trainer(
    system: System,
    settings: Settings,
    seed: int,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    validation: Validation | None = None,
) -> Trainer:
    """Make the trainer of a run, which writes `history.jsonl` into its folder."""
    args = trainer_arguments(system, settings, str(folder), seed)
    common: dict[str, Any] = {"model": model, "args": args, "processing_class": tokenizer}
    history = HistoryFile(folder / "history.jsonl", settings, validation)
    common["callbacks"] = [history, validation] if validation else [history]
    trainer: Trainer
    if system.method == "sft":
        rates = None if settings.get("corpus_errors", True) else NO_ERRORS
        corpus = pretraining_corpus(rollouts(settings), CORPUS_SEED + seed, rates)
        trainer = UnifiedSFTTrainer(train_dataset=corpus, **common)
    elif system.method == "refl":
        dataset = shapeworld_dataset("train", seed=seed)
        trainer = ReFLTrainer(reward=soft_preference_reward, train_dataset=dataset, **common)
    else:
        trained: Any = ReadBackReward() if system.reward == "read_back" else preference_reward
        rewards = [trained, shapeworld_reward, image_error_reward]
        dataset = shapeworld_dataset("train", seed=seed)
        trainer = UniGRPOTrainer(reward_funcs=rewards, train_dataset=dataset, **common)
    trainer.remove_callback(PrinterCallback)
    return trainer
