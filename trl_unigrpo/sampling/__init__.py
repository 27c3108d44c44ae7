"""Sampling: think, paint and decode, once or in several rounds, in training, evaluation and the demo alike."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .generation import (
        Sample,
        Thinking,
        continue_texts,
        decode,
        decode_outside_autocast,
        generate,
        paint,
        paint_and_decode,
        think,
    )

_PUBLIC = {
    "Sample": "generation",
    "Thinking": "generation",
    "continue_texts": "generation",
    "decode": "generation",
    "decode_outside_autocast": "generation",
    "generate": "generation",
    "paint": "generation",
    "paint_and_decode": "generation",
    "think": "generation",
}

__all__ = [
    "Sample",
    "Thinking",
    "continue_texts",
    "decode",
    "decode_outside_autocast",
    "generate",
    "paint",
    "paint_and_decode",
    "think",
]

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
