"""Rewards: plain TRL reward functions on images, usable without a trainer.

Each is imported when first used, and so are the packages that it alone needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .remote import RemoteReward

_HOME_OF = {
    "RemoteReward": "remote",
}

__all__ = ["RemoteReward"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
