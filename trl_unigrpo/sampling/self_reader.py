"""The model that paints, as a reader of its own images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.contract import UnifiedModelMixin
from ..models.memory import READ, in_fitting_batches
from ..models.reference import adapted_layers
from ..rewards.readback.read_back_reward import ReadBackReward
from ..rewards.readback.reading import Reading, pieces


AT_ONCE = 64
"""Images read at once, to begin with."""
_AROUND = 4
"""Positions that an image, a start marker and an end marker take."""


def read_by_painter(reward_funcs: Iterable[Any]) -> list[ReadBackReward]:
    """Find the rewards that read by the model that paints, `functools.partial` of them included."""
    inner = [function.func if isinstance(function, partial) else function for function in reward_funcs]
    return [reward for reward in inner if isinstance(reward, ReadBackReward) and reward.reads_itself]


def bring_readers(
    reward_funcs: Iterable[Any],
    model: UnifiedModelMixin,
    tokenizer: PreTrainedTokenizerBase,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> None:
    """Give the rewards that read by the model that paints this model; see [`SelfReader`]."""
    for reward in read_by_painter(reward_funcs):
        reward.attach(SelfReader(model, tokenizer, reward.judge, autocast))


class SelfReader:
    """
    Reads by the model's own understanding, as its users would show it the images: pixels of 8 bits, encoded anew.

    Args:
        model: a unified model that has `read_back`.
        tokenizer: its own.
        judge: "reference", the weights that training starts from, or "policy", those of the time.
        autocast: makes the context of the precision that the model computes in; None for its own.

    Raises:
        ValueError: if the model can't read.
    """

    def __init__(
        self,
        model: UnifiedModelMixin,
        tokenizer: PreTrainedTokenizerBase,
        judge: str = "reference",
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ):
        model.read_back([], [])  # raises where it reads none
        self.model, self.tokenizer, self.judge = model, tokenizer, judge
        self.autocast = autocast or nullcontext
        self.last_error = ""
        self.largest_image_batch: int | None = None

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Reading | None]:
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        fitting = [place for place, tokens in enumerate(ids) if self._fits(tokens)]
        readings: list[Reading | None] = [None] * len(ids)

        def some(part: slice) -> list[Reading | None]:
            places = fitting[part]
            shown = self.model.read_images([images[place] for place in places])
            found = self.model.read_back(shown, [ids[place] for place in places])
            return [self._reading(texts[place], ids[place], row) for place, row in zip(places, found, strict=True)]

        with self._judging(), self.autocast():
            found = in_fitting_batches(self, len(fitting), AT_ONCE, some, READ)
        for place, reading in zip(fitting, found, strict=True):
            readings[place] = reading
        return readings

    def _reading(self, text: str, tokens: Sequence[int], log_probs: Tensor) -> Reading | None:
        if not log_probs.isfinite().all():
            self.last_error = f"The model reads NaN or infinity in {self.model.dtype}: try another precision."
            return None
        return Reading(pieces(self.tokenizer, text, tokens), log_probs.tolist())

    def _fits(self, tokens: Sequence[int]) -> bool:
        """Say whether a text fits into the context behind an image; why, if it does not."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        fits = limit is None or len(tokens) + _AROUND <= limit
        if not fits:
            self.last_error = f"A prompt of {len(tokens)} tokens does not fit into the reader's context of {limit}."
        return fits

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """Have the weights read that are to, in evaluation mode; of a model that was never trained, its own."""
        model, training = self.model, self.model.training
        started = model.kept_reference is not None or bool(adapted_layers(model))
        model.eval()
        try:
            with model.reference() if self.judge == "reference" and started else nullcontext():
                yield
        finally:
            model.train(training)
