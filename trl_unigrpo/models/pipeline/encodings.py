"""Prompts as a pipeline's text encoders read them: encoded once, for any number of runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..patching import attributes
from .reading import noted_tokens


@dataclass
class Encodings:
    """
    Prompts, and the encoders' outputs for them: encoded when first needed, once for any number of velocities.

    Attributes:
        grad: whether they are encoded with a gradient.
        outputs: what the encoders returned, call by call.
        tokens: rows of tokens that they read for it.
        subsets: encodings of some of the prompts, by their indices.
        checked: whether the pipeline has seen the prompts.
    """

    prompts: Sequence[str]
    grad: bool = False
    outputs: list[Any] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    subsets: dict[tuple[int, ...], "Encodings"] = field(default_factory=dict)
    checked: bool = False

    def subset(self, rows: Sequence[int]) -> "Encodings":
        """Return the encodings of some of the prompts."""
        prompts = [self.prompts[row] for row in rows]
        return self.subsets.setdefault(tuple(rows), Encodings(prompts, self.grad))


@contextmanager
def remembered_encodings(pipeline: Any, encoders: Sequence[nn.Module], encodings: Encodings) -> Iterator[None]:
    """
    Let text encoders return what they returned before, or keep what they return now.

    Args:
        encoders: the networks that encode; all of it, where the pipeline has no `encode_prompt`.
    """
    known, replies = bool(encodings.outputs), iter(list(encodings.outputs))

    def remembering(encode: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if not known:
                torch.set_grad_enabled(encodings.grad)
                with noted_tokens(encoders) as tokens:
                    encodings.outputs.append(encode(*args, **kwargs))
                encodings.tokens += tokens
                torch.set_grad_enabled(False)
            output = next(replies) if known else encodings.outputs[-1]
            return tree_map(lambda x: x, output)  # lists of its own: some pipelines write into them

        return remembered

    with ExitStack() as stack:
        if hasattr(pipeline, "encode_prompt"):
            encode = remembering(pipeline.encode_prompt)
            stack.enter_context(attributes(pipeline, encode_prompt=encode))
        else:
            for encoder in encoders:
                stack.enter_context(attributes(encoder, forward=remembering(encoder.forward)))
        yield
