"""The reach of a pipeline's text encoders, which cut off what is too long, and a test of its VAE's numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerBase

from ..patching import attributes


END = 32
"""Letters and digits at the end of a prompt that are looked for in what was read."""


@contextmanager
def noted_tokens(encoders: Sequence[nn.Module]) -> Iterator[list[list[int]]]:
    """List the rows of tokens that text encoders embed."""
    rows: list[list[int]] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        ids = inputs[0] if inputs else None
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            rows.extend(ids.tolist())

    embeddings = [module for encoder in encoders for module in encoder.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_pre_hook(note) for module in embeddings]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def cut_off(
    prompts: Sequence[str], rows: Sequence[Sequence[int]], outputs: Any, tokenizers: Sequence[PreTrainedTokenizerBase]
) -> list[tuple[str, int, int]]:
    """
    Find the prompts whose end no text encoder read.

    Args:
        rows: of tokens that encoders embedded.
        outputs: encodings that came of it, which may be shorter.
        tokenizers: of the pipeline; which is whose is found by trying.

    Returns:
        Each such prompt, its length in tokens, and how many of them were read.
    """
    kept = max((max(x.shape[:-1]) for x in tree_leaves(outputs) if _is_encoding(x)), default=0)
    found: dict[str, tuple[str, int, int] | None] = {}
    for tokenizer in tokenizers:
        texts = [_letters(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        longest = max((sum(token != tokenizer.pad_token_id for token in row) for row in rows), default=0)
        for prompt in dict.fromkeys(prompts):
            ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            wanted = _letters(tokenizer.decode(ids, skip_special_tokens=True))
            read = any(wanted[-END:] in text and len(wanted) <= len(text) for text in texts)
            if read and len(ids) <= (kept or len(ids)):
                found[prompt] = None
            else:
                found.setdefault(prompt, (prompt, len(ids), min(longest, kept) if kept else longest))
    return [cut for cut in found.values() if cut is not None]


def _letters(text: str) -> str:
    """Keep what survives a tokenizer's own way with case and spaces."""
    return "".join(filter(str.isalnum, text.lower()))


def _is_encoding(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1


@contextmanager
def noted_numbers(vae: Any) -> Iterator[list[bool]]:
    """List, for each image that a VAE decodes, whether its pixels are finite numbers."""
    finite: list[bool] = []
    if vae is None:
        yield finite
        return
    decode = vae.decode

    def noting(*args: Any, **kwargs: Any) -> Any:
        decoded = decode(*args, **kwargs)
        pixels = decoded[0] if isinstance(decoded, tuple) else decoded.sample
        finite.extend(pixels.isfinite().flatten(1).all(1).tolist())
        return decoded

    with attributes(vae, decode=noting):
        yield finite
