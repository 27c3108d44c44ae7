"""A counter of the FLOPs that a run really computes, attention over visible pairs included."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], is_causal: bool = False) -> int:
    """Count scores and weighted sum of (B, A, S, D) queries over (B, A, S', D) keys: 4 B A D a visible pair."""
    batch, heads, length, size = query
    pairs = sum(min(i + 1, key[2]) for i in range(length)) if is_causal else length * key[2]
    return 4 * batch * heads * size * pairs


def _forward(query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any) -> int:
    return attention_flops(query, key, is_causal)


def _backward(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    dropout_p: float,
    is_causal: bool,
    **kwargs: Any,
) -> int:
    """Count five products, to the forward's two: scores again, gradients of scores, values, queries and keys."""
    return attention_flops(query, key, is_causal) * 5 // 2


# FlopCounterMode knows the kernels of GPUs, not the one of CPUs.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count what runs inside: `counter.get_total_flops()`."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        yield counter
