"""Prompts and source images as a pipeline's encoders read them: encoded once, for any number of runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..patching import attributes
from .reading import noted_tokens


@dataclass
class EditPrompt:
    """
    The context of an edited image.

    Attributes:
        text: the painter's prompt.
        images: the source images, (height, width, 3) each, bytes.
    """

    text: str
    images: list[Tensor]


@dataclass
class Encodings:
    """
    Prompts, and the encoders' outputs for them: encoded when first needed, once for any number of velocities.

    Attributes:
        grad: whether they are encoded with a gradient.
        sources: of each prompt the source images, (height, width, 3) bytes each; empty where no prompt has one. One
            run shows all its prompts the same.
        outputs: what the encoders returned, call by call.
        latents: what the VAE returned of the source images.
        tokens: rows of tokens that they read for it.
        subsets: encodings of some of the prompts, by their indices.
        checked: whether the pipeline has seen the prompts.
    """

    prompts: Sequence[str]
    grad: bool = False
    sources: Sequence[Sequence[Tensor]] = ()
    outputs: list[Any] = field(default_factory=list)
    latents: list[Any] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    subsets: dict[tuple[int, ...], "Encodings"] = field(default_factory=dict)
    checked: bool = False

    def subset(self, rows: Sequence[int]) -> "Encodings":
        """Return the encodings of some of the prompts."""
        prompts = [self.prompts[row] for row in rows]
        sources = [self.sources[row] for row in rows] if self.sources else ()
        return self.subsets.setdefault(tuple(rows), Encodings(prompts, self.grad, sources))

    def source(self, row: int) -> tuple[int, ...]:
        """Tell which source images a prompt has: equal for prompts that have the same."""
        return tuple(map(id, self.sources[row])) if self.sources else ()

    @property
    def images(self) -> list[Image.Image]:
        """The source images that all these prompts have."""
        return [Image.fromarray(pixels.numpy()) for pixels in self.sources[0]] if self.sources else []


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
        vae = getattr(pipeline, "vae", None)
        if encodings.sources and vae is not None:
            stack.enter_context(attributes(vae, encode=remembered_calls(vae.encode, encodings.latents)))
        yield


def remembered_calls(function: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    """Let a function return what it returned before, call by call, or keep what it returns now."""
    known, replies = bool(kept), iter(list(kept))

    def remembered(*args: Any, **kwargs: Any) -> Any:
        if not known:
            kept.append(function(*args, **kwargs))
        return next(replies) if known else kept[-1]

    return remembered
