"""Rewards: plain TRL reward functions on images, usable without a trainer.

Public names are imported when first used: some need packages that only an extra installs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .judge import VLMJudge
    from .local_judge import LocalVLMJudge

_HOME_OF = {
    "LocalVLMJudge": "local_judge",
    "VLMJudge": "judge",
}

__all__ = [
    "LocalVLMJudge",
    "VLMJudge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
