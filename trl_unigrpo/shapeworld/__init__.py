"""ShapeWorld: a built-in world of coloured shapes: prompts, a renderer, a rule that scores pictures, a tiny model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .base import BASE, load_base
    from .dataset import shapeworld_dataset
    from .demo import demo_settings, run_demo
    from .evaluate import evaluate_model
    from .verifier import picture_error, shapeworld_reward

_PUBLIC = {
    "BASE": "base",
    "demo_settings": "demo",
    "evaluate_model": "evaluate",
    "load_base": "base",
    "picture_error": "verifier",
    "run_demo": "demo",
    "shapeworld_dataset": "dataset",
    "shapeworld_reward": "verifier",
}

__all__ = [
    "BASE",
    "demo_settings",
    "evaluate_model",
    "load_base",
    "picture_error",
    "run_demo",
    "shapeworld_dataset",
    "shapeworld_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
