"""The repeated blocks of a network: where adapters go, and what is computed twice to save memory."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..patching import attributes


def block_lists(network: nn.Module) -> dict[str, nn.ModuleList]:
    """
    Find the lists of repeated blocks, by name: the outermost `ModuleList`s, which are what a forward walks through.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def linear_names(network: nn.Module, prefix: str = "") -> list[str]:
    """
    Write regular expressions, behind a prefix, of the names of linear layers in a network's blocks, adapted or not.
    """
    patterns = set()
    for outer, blocks in block_lists(network).items():
        for name, module in blocks.named_modules():
            rest = name.removesuffix(".base_layer").partition(".")[2]
            if rest and isinstance(module, nn.Linear) and ".lora_" not in name:
                start = f"{prefix}.{outer}" if prefix else outer
                patterns.add(rf"{re.escape(start)}\.\d+\.{re.escape(rest)}")
    return sorted(patterns)


@contextmanager
def recomputed_blocks(network: nn.Module, enabled: bool) -> Iterator[None]:
    """
    Let every block forget what it computed inside of it, and compute it again when its gradient is asked for.

    Some networks' own way of doing so leaves arguments out, or fails; this one passes on what it is given.
    """
    blocks = [block for blocks in block_lists(network).values() for block in blocks] if enabled else []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(attributes(block, forward=_recomputed(block.forward)))
        yield


def _recomputed(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        # Without dropout there is no random state to keep: painters stay in evaluation mode.
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward
