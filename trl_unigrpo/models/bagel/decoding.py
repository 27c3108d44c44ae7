"""Decoding in a recorded step: on a GPU a token is thousands of small kernels, and launching them takes the time.

A CUDA graph launches them at once, but sees the same memory each time: keys and values stand in tensors with room for
more, and a token looks at those of its row that are written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

ROOM = 256
"""Tokens that a recorded step has room for, at least, before it is recorded again with as much more."""
WARM_UP = 2
"""Runs before recording, in which libraries choose their kernels."""

Step = Callable[[Tensor, Tensor, Tensor, "Room"], Tensor]
"""Computes logits (B, 1, vocabulary) of tokens (B, 1) at positions (B, 1), under a mask (B, 1, 1, S), with a cache."""


class Room:
    """
    Keys and values of B rows, one (B, V, S, D) tensor per layer that stays where it is.

    Args:
        states: keys and values (B, V, length, D) per layer, to begin with.

    Attributes:
        size: S, the tokens that there is room for.
        at: (1,) where the next token's are written.
    """

    def __init__(self, states: Sequence[tuple[Tensor, Tensor]], length: int):
        self.size = -(-(length + ROOM) // 64) * 64  # attention likes round numbers
        self.keys, self.values = ([_with_room(x, self.size) for x in kind] for kind in zip(*states, strict=True))
        self.at = torch.tensor([length], device=self.keys[0].device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a token's keys and values (B, V, 1, D), and return those of all S."""
        return self.keys[layer].index_copy_(2, self.at, keys), self.values[layer].index_copy_(2, self.at, values)

    def get_seq_length(self, layer: int = 0) -> int:
        """Return S: the mask, not a length, says what is written."""
        return self.size


class RecordedStep:
    """A step over a room as a CUDA graph; where there is no GPU, or it can't be recorded, the step itself."""

    def __init__(self, step: Step, room: Room, ids: Tensor, positions: Tensor, mask: Tensor):
        self.room, self._step = room, step
        self._ids, self._positions = ids.clone(), positions.clone()
        self._mask = torch.zeros(len(ids), 1, 1, room.size, dtype=torch.bool, device=ids.device)
        self._graph, self._logits = None, None
        if ids.device.type == "cuda":
            self._mask[..., : mask.shape[1]] = mask[:, None, None].bool()
            try:
                self._graph, self._logits = self._record()
            except RuntimeError as error:
                logger.warning_once(f"Tokens are decoded kernel by kernel, as this can't be recorded: {error}")

    def _run(self) -> Tensor:
        return self._step(self._ids, self._positions, self._mask, self.room)

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the step. What it writes meanwhile, at the next token's place, is written again."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run()
        return graph, logits

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Compute the logits of tokens (B, 1) under a mask (B, S' + 1) of all tokens so far, these included."""
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._mask[..., : mask.shape[1]] = mask[:, None, None].bool()
        if self._graph is None or self._logits is None:
            logits = self._run()
        else:
            self._graph.replay()
            logits = self._logits.clone()
        self.room.at += 1
        return logits


class DecodingCache(DynamicCache):
    """
    A cache that grows over the prompt, and whose single tokens are then computed in a recorded step.

    Args:
        config: of the decoder.
        step: computes one token of each row.
    """

    def __init__(self, config: PreTrainedConfig, step: Step):
        super().__init__(config=config)
        self._step, self._length = step, 0
        self._recorded: RecordedStep | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self._recorded is None else self._length

    def decode(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """
        Compute logits (B, 1, vocabulary) of one more token of each row.

        Args:
            ids, positions: (B, 1) of the tokens.
            mask: (B, S' + 1), 1 at real tokens, these included.
        """
        length = self.get_seq_length()
        if self._recorded is None:
            room = Room([(layer.keys, layer.values) for layer in self.layers], length)
            self.reset()
            self._recorded = RecordedStep(self._step, room, ids, positions, mask)
        elif length == self._recorded.room.size:
            full = self._recorded.room
            room = Room(list(zip(full.keys, full.values, strict=True)), length)
            self._recorded = RecordedStep(self._step, room, ids, positions, mask)
        self._length = length + 1
        return self._recorded(ids, positions, mask)


def _with_room(x: Tensor, size: int) -> Tensor:
    """Copy (B, V, L, D) to the beginning of (B, V, size, D)."""
    roomy = x.new_zeros(*x.shape[:2], size, x.shape[3])
    roomy[:, :, : x.shape[2]] = x
    return roomy


def samples_token_by_token(defaults: GenerationConfig, arguments: Mapping[str, Any]) -> bool:
    """Say whether a call of `generate` decodes one token of each row at a time, with a cache that it makes itself."""
    asked = {**vars(defaults), **vars(arguments.get("generation_config") or defaults), **arguments}
    ways = ("cache_implementation", "prompt_lookup_num_tokens", "assistant_model", "past_key_values", "cache")
    plain = all(asked.get(way) is None for way in ways)
    return plain and asked.get("num_beams") in (None, 1) and asked.get("use_cache") is not False
