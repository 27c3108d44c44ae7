"""Ctrl-C and SIGTERM save a checkpoint before the run ends."""

import logging
import signal
import threading
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnSignal(TrainerCallback):
    """
    A callback that, at the first SIGINT or SIGTERM, lets the optimizer step end, saves a checkpoint and stops; a
    second signal acts as always.

    Does nothing where checkpoints are switched off (`save_strategy="no"`) or off the main thread. All processes stop
    at the same step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._received = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_strategy != "no" and threading.current_thread() is threading.main_thread():
            self._received = False
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True
        self._restore()
        logger.warning(
            "%s: saving a checkpoint after this step. Once more stops at once.", signal.Signals(number).name
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_strategy == "no":
            return
        received = reduce(torch.tensor(float(self._received), device=args.device), reduction="sum")
        if received > 0:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
