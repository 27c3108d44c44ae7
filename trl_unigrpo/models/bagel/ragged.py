"""Copies that see prefixes of different lengths, packed for one attention kernel without padding.

Shapes: P copies of Q = 2 + N queries each, A query heads, V key heads, D head size, T keys in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor


@dataclass
class Packing:
    """
    Where the keys of copies stand, one copy after the other.

    Attributes:
        index: (T,) rows of [the contexts' tokens | the copies' own].
        starts: (2, P + 1) where each copy's queries and keys begin, and the last ones end.
        longest: keys of the copy that has most.
    """

    index: Tensor
    starts: Tensor
    longest: int

    @classmethod
    def of(cls, visible: Sequence[Sequence[int]], context: int, queries: int) -> "Packing":
        """
        Lay out copies, on the CPU.

        Args:
            visible: (R, K) tokens of its row's context that each copy sees.
            context: tokens of a context, padding included.
            queries: Q.
        """
        lengths = [(row, length) for row, seen in enumerate(visible) for length in seen]
        own = len(visible) * context
        parts = []
        for copy, (row, length) in enumerate(lengths):
            first = own + copy * queries
            parts += [
                torch.arange(row * context, row * context + length),
                torch.arange(first, first + queries),
            ]
        keys = torch.tensor([0, *(length + queries for _, length in lengths)]).cumsum(0)
        starts = torch.stack([torch.arange(len(lengths) + 1) * queries, keys])
        return cls(torch.cat(parts), starts, max(length for _, length in lengths) + queries)

    def on(self, index: Tensor, starts: Tensor) -> "Packing":
        """Give the same with its numbers on another device, where they have been moved."""
        return replace(self, index=index, starts=starts)


@cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """Find torch's attention over rows of different lengths, which it has from 2.10 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # Where it has no such argument it takes groups as they are.
    groups: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, queries: int) -> Any:
        ends = starts.int()
        return varlen_attn(q, k, v, ends[0], ends[1], queries, longest, **groups)

    return kernel


def computed_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that attention computes in: autocast's where it is on, which casts behind this call."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else x.dtype


def packs(weight: Tensor, visible: Sequence[Sequence[int]]) -> bool:
    """
    Say whether copies that see so much are packed: ragged ones, on a GPU in half precision, which the kernel is for.
    """
    ragged = len({length for row in visible for length in row}) > 1
    half = computed_dtype(weight) in (torch.bfloat16, torch.float16)
    return ragged and half and weight.device.type == "cuda" and varlen_kernel() is not None


def attend_packed(copies: Sequence[Tensor], seen: Sequence[Tensor], packing: Packing) -> Tensor:
    """
    Attend from each copy to a prefix of its context and itself: outputs (P, A, Q, D).

    Args:
        copies: queries, keys and values (P, ., Q, D).
        seen: keys and values (R, V, S, D) of the contexts.
    """
    kernel, (count, _, queries, _) = varlen_kernel(), copies[0].shape
    assert kernel is not None
    dtype = computed_dtype(copies[0])

    def rows(x: Tensor) -> Tensor:
        return x.to(dtype).transpose(1, 2).flatten(0, 1)

    keys, values = (
        torch.cat([rows(context), rows(own)]).index_select(0, packing.index)
        for context, own in zip(seen, copies[1:], strict=True)
    )
    out = kernel(rows(copies[0]), keys, values, packing.starts, packing.longest, queries)
    return out.unflatten(0, (count, queries)).transpose(1, 2)
