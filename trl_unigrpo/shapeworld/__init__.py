"""ShapeWorld: a built-in world of coloured shapes: prompts, a renderer, a rule that scores images, a tiny model."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .base import BASE, SEEING_BASE, load_base
    from .dataset import shapeworld_dataset, shapeworld_edit_dataset, shapeworld_story_dataset
    from .edits import shapeworld_edit_reward, shapeworld_story_reward
    from .evaluate import evaluate_model
    from .preference import preference_reward, soft_preference_reward
    from .reflection import REFLECTION_TEMPLATE, shapeworld_diagnosis_reward
    from .settings import demo_settings
    from .soft_reward import soft_shapeworld_reward
    from .verifier import image_error, shapeworld_reward

_PUBLIC = {
    "BASE": "base",
    "REFLECTION_TEMPLATE": "reflection",
    "SEEING_BASE": "base",
    "demo_settings": "settings",
    "evaluate_model": "evaluate",
    "load_base": "base",
    "image_error": "verifier",
    "preference_reward": "preference",
    "shapeworld_dataset": "dataset",
    "shapeworld_diagnosis_reward": "reflection",
    "shapeworld_edit_dataset": "dataset",
    "shapeworld_edit_reward": "edits",
    "shapeworld_reward": "verifier",
    "shapeworld_story_dataset": "dataset",
    "shapeworld_story_reward": "edits",
    "soft_preference_reward": "preference",
    "soft_shapeworld_reward": "soft_reward",
}

__all__ = [
    "BASE",
    "REFLECTION_TEMPLATE",
    "SEEING_BASE",
    "demo_settings",
    "evaluate_model",
    "image_error",
    "load_base",
    "preference_reward",
    "shapeworld_dataset",
    "shapeworld_diagnosis_reward",
    "shapeworld_edit_dataset",
    "shapeworld_edit_reward",
    "shapeworld_reward",
    "shapeworld_story_dataset",
    "shapeworld_story_reward",
    "soft_preference_reward",
    "soft_shapeworld_reward",
]

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
