"""ShapeWorld: a built-in world of coloured shapes: prompts, a renderer, a rule that scores images, a tiny model."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .base import BASE, load_base
    from .dataset import shapeworld_dataset
    from .evaluate import evaluate_model
    from .settings import demo_settings
    from .soft_reward import soft_shapeworld_reward
    from .verifier import picture_error, shapeworld_reward

_PUBLIC = {
    "BASE": "base",
    "demo_settings": "settings",
    "evaluate_model": "evaluate",
    "load_base": "base",
    "picture_error": "verifier",
    "shapeworld_dataset": "dataset",
    "shapeworld_reward": "verifier",
    "soft_shapeworld_reward": "soft_reward",
}

__all__ = [
    "BASE",
    "demo_settings",
    "evaluate_model",
    "load_base",
    "picture_error",
    "shapeworld_dataset",
    "shapeworld_reward",
    "soft_shapeworld_reward",
]

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
