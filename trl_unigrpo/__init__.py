"""trl-unigrpo: UniGRPO (arXiv 2603.23500) as a TRL plugin.

Public names are imported when first used, so that `import trl_unigrpo` and the command line stay fast.
"""

from typing import TYPE_CHECKING

from .__about__ import __version__
from .lazy import lazy_names


if TYPE_CHECKING:
    from .models.bagel import BagelConfig, BagelForUnifiedGeneration
    from .models.contract import UnifiedModelMixin
    from .models.pipeline import PipelineForUnifiedGeneration
    from .trainers.refl_trainer import ReFLConfig, ReFLTrainer
    from .trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
    from .trainers.unigrpo_config import UniGRPOConfig
    from .trainers.unigrpo_trainer import UniGRPOTrainer

_HOME_OF = {
    "BagelConfig": "models.bagel",
    "BagelForUnifiedGeneration": "models.bagel",
    "PipelineForUnifiedGeneration": "models.pipeline",
    "ReFLConfig": "trainers.refl_trainer",
    "ReFLTrainer": "trainers.refl_trainer",
    "UnifiedModelMixin": "models.contract",
    "UnifiedSFTConfig": "trainers.sft_trainer",
    "UnifiedSFTTrainer": "trainers.sft_trainer",
    "UniGRPOConfig": "trainers.unigrpo_config",
    "UniGRPOTrainer": "trainers.unigrpo_trainer",
}

__all__ = [
    "BagelConfig",
    "BagelForUnifiedGeneration",
    "PipelineForUnifiedGeneration",
    "ReFLConfig",
    "ReFLTrainer",
    "UniGRPOConfig",
    "UniGRPOTrainer",
    "UnifiedModelMixin",
    "UnifiedSFTConfig",
    "UnifiedSFTTrainer",
    "__version__",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME_OF)
