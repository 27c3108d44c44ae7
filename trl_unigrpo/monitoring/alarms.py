"""Alarms: a callback that watches a whole run for what has ruined public ones, and says what to do."""

import logging
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..models.experts import clip_by_expert
from ..models.registry import unified_model
from .alarm import Alarm, append_alarm, forget_alarms
from .events import Generation, Update, Watcher
from .image_alarms import ImageWatch
from .letters_alarms import LettersWatch
from .memory import revive
from .reward_alarms import RewardWatch
from .round_alarms import RoundWatch, round_metrics
from .thinking_alarms import ThinkingWatch, plain_text, repetition
from .tripwire import NOT_FINITE, Tripwire
from .understanding_alarms import CAPTIONS_FOLDER, EVERY, MakeReader, UnderstandingWatch, policy_reader


logger = logging.getLogger(__name__)

COOL_DOWN = 50
"""Optimizer steps for which an alarm that was given is not given again."""


def default_alarms(mode: str) -> list["Alarms"]:
    """Make the alarms of a run, by its `alarms`."""
    return [] if mode == "off" else [Alarms(mode)]


class Alarms(Watcher, ExportableState):
    """
    A watcher of updates, images, rewards, rounds, thinkings and, where a reward reads back, of what that may cost. An
    alarm is a line in the log and in `alarms.jsonl` in the output folder (see [`append_alarm`]).

    What it knows of the start of the run is saved in the checkpoint's `trainer_state.json` and comes back on resuming.

    Args:
        mode: "stop", or "warn" to go on whatever happens.
    """

    def __init__(self, mode: str = "stop"):
        self.mode = mode
        self._remember({})
        self._updates_told = 0
        self._metrics: MutableMapping[str, list[float]] = {}
        self._tokenizer: Any = None

    # Memory, which survives a checkpoint

    def _remember(self, memory: dict[str, Any]) -> None:
        self._tripwire = revive(Tripwire, memory.get("tripwire", {}))
        self._images = revive(ImageWatch, memory.get("images", {}))
        self._rewards = revive(RewardWatch, memory.get("rewards", {}))
        self._rounds = revive(RoundWatch, memory.get("rounds", {}))
        self._thinking = revive(ThinkingWatch, memory.get("thinking", {}))
        self._letters = revive(LettersWatch, memory.get("letters", {}))
        self._understanding = revive(UnderstandingWatch, memory.get("understanding", {}))
        self._said: dict[str, int] = dict(memory.get("said", {}))  # alarm -> step
        self._signal: float = memory.get("signal", 1.0)  # root mean square of the advantages that are trained on

    def state(self) -> dict[str, Any]:
        memory = {
            "tripwire": asdict(self._tripwire),
            "images": asdict(self._images),
            "rewards": asdict(self._rewards),
            "rounds": asdict(self._rounds),
            "thinking": asdict(self._thinking),
            "letters": asdict(self._letters),
            "understanding": asdict(self._understanding),
            "said": dict(self._said),
            "signal": self._signal,
        }
        return {"args": {"mode": self.mode}, "attributes": {"memory": memory}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self._tokenizer = processing_class
        # Trainer restores callbacks only if told to, and fails to save one that the checkpoint did not have.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._remember(saved["attributes"]["memory"] if state.global_step else {})
        if state.is_world_process_zero:
            forget_alarms(args.output_dir, state.global_step)
        if not self._understanding.restore(Path(args.output_dir) / CAPTIONS_FOLDER, state.is_world_process_zero):
            self._understanding = UnderstandingWatch()
            logger.warning(
                "%s does not hold the images whose captions were read before: understanding is compared with what it "
                "is now.",
                Path(args.output_dir) / CAPTIONS_FOLDER,
            )

    # Events

    def on_generation(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        generation: Generation,
        metrics: MutableMapping[str, list[float]],
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        texts = [plain_text(thinking) for thinking in generation.thinking]
        repeated = np.array([repetition(text) for text in texts])
        trains, prompts = generation.mode == "train", list(map(str, generation.prompts))
        each = getattr(args, "images_per_thinking", 1) if trains else 1
        images = self._images.statistics(generation.statistics, prompts, trains, each)
        for name, values in {**images, "thinking/repetition": repeated}.items():
            metrics.setdefault(name, []).append(float(values.mean()))
        for name, value in round_metrics(generation).items():
            metrics.setdefault(name, []).append(value)
        if not trains:
            self._rewards.evaluate(generation)
            return
        of_rounds = [note.advantage for notes in generation.rounds for note in notes]
        self._signal = math.sqrt(float(np.square(of_rounds or generation.advantages).mean()))
        clipped = metrics["completions/clipped_ratio"][-1] if "completions/clipped_ratio" in metrics else None
        letters = self._letters.shares(generation)
        if letters:
            metrics.setdefault("read_back/letters", []).append(float(np.mean([*letters.values()])))
        self._metrics = metrics
        if self._understanding.take(generation, Path(args.output_dir) / CAPTIONS_FOLDER, self._policy(model, args)):
            self._note_understanding(self._understanding.before)
        found = [
            *self._images.look(images, generation.group_size),
            *self._rewards.look(generation),
            *self._rounds.look(generation),
            *self._thinking.look(texts, repeated, generation.group_size, clipped),
            *self._letters.look(letters),
        ]
        self._give(found, args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        last = state.global_step >= state.max_steps
        if self._understanding.complete and (last or state.global_step % EVERY == 0):
            log_probs = self._understanding.read(self._policy(model, args))
            self._note_understanding(log_probs)
            control.should_log = control.should_log or last
            self._give(self._understanding.look(log_probs), args, state, control)

    def _policy(self, model: Any, args: TrainingArguments) -> MakeReader:
        return partial(policy_reader, model, self._tokenizer, args)

    def _note_understanding(self, log_probs: Sequence[float]) -> None:
        self._metrics.setdefault("understanding/caption_log_prob", []).append(float(np.mean(log_probs)))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._give(self._rewards.evaluation_ends(), args, state, control, mode="eval")

    def on_update(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        update: Update,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._updates_told = state.global_step + 1
        lags = getattr(args, "image_old_policy_decay", None) is not None
        found = self._tripwire.update(update, self._signal, scaled=args.fp16, lags=lags)
        if any(alarm.name == NOT_FINITE for alarm in found):
            model.zero_grad(set_to_none=True)  # optimizers skip what has none, momentum and weight decay included
        self._give(found, args, state, control)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._updates_told <= state.global_step and not args.fp16:  # nobody clipped: max_grad_norm is 0
            norms = clip_by_expert(unified_model(model), model, math.inf)
            update = Update({name: norm.item() for name, norm in norms.items()}, {})
            self.on_update(args, state, control, update=update, model=model)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if optimizer is not None:
            rates = {group.get("name"): float(group["lr"]) for group in optimizer.param_groups}
            self._tripwire.stepped(rates.get("image", max(rates.values())), self._signal)

    # Alarms

    def _give(
        self,
        found: list[Alarm],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        mode: str = "train",
    ) -> None:
        for alarm in found:
            stops = alarm.stops and self.mode == "stop"
            if not stops and state.global_step < self._said.get(alarm.name, -COOL_DOWN) + COOL_DOWN:
                continue
            self._said[alarm.name] = state.global_step
            if stops:
                control.should_training_stop = True
                control.should_save = args.save_strategy != "no"
            if state.is_world_process_zero:
                append_alarm(args.output_dir, state.global_step, mode, alarm, stops)
                logger.warning("Step %d, %s%s", state.global_step, alarm, _stopping(args) if stops else "")


def _stopping(args: TrainingArguments) -> str:
    if args.save_strategy == "no":
        return " The run stops here, without a checkpoint, as save_strategy is 'no'."
    return " A checkpoint is saved and the run stops here."
