"""Decoding in recorded steps.

A CUDA graph sees the same memory each time, so keys and values stand in tensors with room for more, and a token looks
at those of its row that are written.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig

from ..recording import Recorded
from .attention import Context, left_padded


ROOM = 256
"""Tokens that a recorded step has room for, at least, before it is recorded again with as much more."""

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
        all_keys, all_values = self.keys[layer], self.values[layer]
        all_keys.index_copy_(2, self.at, keys.to(all_keys.dtype))
        all_values.index_copy_(2, self.at, values.to(all_values.dtype))
        return all_keys, all_values

    def get_seq_length(self, layer: int = 0) -> int:
        """Return S: the mask, not a length, says what is written."""
        return self.size


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
        self._room: Room | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self._room is None else self._length

    def decode(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """
        Compute logits (B, 1, vocabulary) of one more token of each row.

        Args:
            ids, positions: (B, 1) of the tokens.
            mask: (B, S' + 1), 1 at real tokens, these included.
        """
        self._length = self.get_seq_length()
        if self._room is None:
            self._make_room([(layer.keys, layer.values) for layer in self.layers])
            self.reset()
        elif self._length == self._room.size:
            self._make_room(list(zip(self._room.keys, self._room.values, strict=True)))
        assert self._room is not None
        self._mask[..., : mask.shape[1]] = mask[:, None, None].bool()
        logits = self._recorded(ids, positions, self._mask)
        self._room.at += 1
        self._length += 1
        return logits

    def _make_room(self, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._room = Room(states, self._length)
        self._recorded = Recorded(partial(_in_room, self._step, self._room))
        rows, device = len(states[0][0]), states[0][0].device
        self._mask = torch.zeros(rows, 1, 1, self._room.size, dtype=torch.bool, device=device)


def _in_room(step: Step, room: Room, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    return step(ids, positions, mask, room)


def _with_room(x: Tensor, size: int) -> Tensor:
    """Copy (B, V, L, D) to the beginning of (B, V, size, D)."""
    roomy = x.new_zeros(*x.shape[:2], size, x.shape[3])
    roomy[:, :, : x.shape[2]] = x
    return roomy


def empty_cache(model: Any) -> DynamicCache:
    """Make the cache that a BAGEL decodes with: on a GPU in recorded steps."""
    config = model.config.llm_config
    return DecodingCache(config, model.next_logits) if model.device.type == "cuda" else DynamicCache(config=config)


def samples_token_by_token(defaults: GenerationConfig, arguments: Mapping[str, Any]) -> bool:
    """Say whether a call of `generate` decodes one token of each row at a time, with a cache that it makes itself."""
    asked = {**vars(defaults), **vars(arguments.get("generation_config") or defaults), **arguments}
    ways = ("cache_implementation", "prompt_lookup_num_tokens", "assistant_model", "past_key_values", "cache")
    plain = all(asked.get(way) is None for way in ways)
    return plain and asked.get("num_beams") in (None, 1) and asked.get("use_cache") is not False


def after_context(
    generate: Callable[..., Tensor],
    context: Context,
    ids: Tensor,
    cache: DynamicCache,
    cache_name: str,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """
    Call transformers' `generate` behind contexts that are encoded already, all but the last token of each.

    Args:
        generate: of transformers.
        context: B of them.
        ids: (B, T) the tokens of the prompts, which stand before the new ones in what is returned.
        cache: an empty one.
        cache_name: of the cache among the arguments.
    """
    known = left_padded(context)
    for layer, (keys, values) in enumerate(zip(known.keys, known.values, strict=True)):
        cache.update(keys, values, layer)
    size = context.keys[0].shape[2]
    missing = size - torch.tensor(context.lengths, device=ids.device)[:, None]
    column = torch.arange(size + 1, device=ids.device)
    last = torch.tensor(context.positions, device=ids.device)[:, None]
    settings: dict[str, Any] = {"return_dict_in_generate": False, "use_cache": True}
    if (given := kwargs.pop("generation_config", None)) is not None:  # takes no settings beside it
        given = copy.copy(given)
        given.update(**settings)
        settings = {"generation_config": given}
    out = generate(
        torch.cat([ids[:, :1].expand(-1, size), ids[:, -1:]], dim=1),
        *args,
        position_ids=last.expand(-1, size + 1).contiguous(),
        padded=min(context.lengths) < size,
        **{**kwargs, cache_name: cache, "attention_mask": (column >= missing).long(), **settings},
    )
    return torch.cat([ids, out[:, size + 1 :]], dim=1)
