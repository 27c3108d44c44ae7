"""`trl-unigrpo demo`: UniGRPO on ShapeWorld in minutes, and a report of what changed."""

from typing import TYPE_CHECKING

from ...lazy import lazy_names


if TYPE_CHECKING:
    from .demo import run_demo

__all__ = ["run_demo"]

__getattr__, __dir__ = lazy_names(__name__, {"run_demo": "demo"})
