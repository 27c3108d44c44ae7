"""Rewards: plain TRL reward functions on images, usable without a trainer.

Names are imported when first used: what a reward needs is loaded with it alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .clip import ClipReward, aesthetic_score, clip_score, hps_v2, pick_score, siglip_score
    from .geneval import GenEvalReward
    from .ocr import OCRReward
    from .rules import jpeg_size, sharpness, think_format, thinking_length

_HOME_OF = {
    "ClipReward": "clip",
    "GenEvalReward": "geneval",
    "OCRReward": "ocr",
    "aesthetic_score": "clip",
    "clip_score": "clip",
    "hps_v2": "clip",
    "jpeg_size": "rules",
    "pick_score": "clip",
    "sharpness": "rules",
    "siglip_score": "clip",
    "think_format": "rules",
    "thinking_length": "rules",
}

__all__ = [
    "ClipReward",
    "GenEvalReward",
    "OCRReward",
    "aesthetic_score",
    "clip_score",
    "hps_v2",
    "jpeg_size",
    "pick_score",
    "sharpness",
    "siglip_score",
    "think_format",
    "thinking_length",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
