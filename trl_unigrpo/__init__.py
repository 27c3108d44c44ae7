"""trl-unigrpo: UniGRPO (arXiv 2603.23500) as a TRL plugin.

Public names are imported when first used, so that `import trl_unigrpo` and the command line stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .__about__ import __version__


if TYPE_CHECKING:
    from .models.bagel import BagelConfig, BagelForUnifiedGeneration
    from .models.unified import UnifiedModelMixin
    from .sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
    from .unigrpo_config import UniGRPOConfig
    from .unigrpo_trainer import UniGRPOTrainer

_HOME_OF = {
    "BagelConfig": "models.bagel",
    "BagelForUnifiedGeneration": "models.bagel",
    "UnifiedModelMixin": "models.unified",
    "UnifiedSFTConfig": "sft_trainer",
    "UnifiedSFTTrainer": "sft_trainer",
    "UniGRPOConfig": "unigrpo_config",
    "UniGRPOTrainer": "unigrpo_trainer",
}

__all__ = [
    "BagelConfig",
    "BagelForUnifiedGeneration",
    "UniGRPOConfig",
    "UniGRPOTrainer",
    "UnifiedModelMixin",
    "UnifiedSFTConfig",
    "UnifiedSFTTrainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
