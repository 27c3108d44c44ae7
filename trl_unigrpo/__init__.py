"""trl-unigrpo: UniGRPO (arXiv 2603.23500) as a TRL plugin.

Public names are imported when first used, so that `import trl_unigrpo` and the command line stay fast.
"""

from typing import TYPE_CHECKING

from .__about__ import __version__
from .lazy import lazy_names


if TYPE_CHECKING:
    from .models.bagel import BagelConfig, BagelForUnifiedGeneration
    from .models.pipeline import PipelineForUnifiedGeneration
    from .models.unified import UnifiedModelMixin
    from .refl_trainer import ReFLConfig, ReFLTrainer
    from .sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
    from .unigrpo_config import UniGRPOConfig
    from .unigrpo_trainer import UniGRPOTrainer

_HOME_OF = {
    "BagelConfig": "models.bagel",
    "BagelForUnifiedGeneration": "models.bagel",
    "PipelineForUnifiedGeneration": "models.pipeline",
    "ReFLConfig": "refl_trainer",
    "ReFLTrainer": "refl_trainer",
    "UnifiedModelMixin": "models.unified",
    "UnifiedSFTConfig": "sft_trainer",
    "UnifiedSFTTrainer": "sft_trainer",
    "UniGRPOConfig": "unigrpo_config",
    "UniGRPOTrainer": "unigrpo_trainer",
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
