"""Releases of TRL that this package works with, the options that it needs, and the error for all others."""

import logging
import os
from functools import cache

import trl
from packaging.specifiers import SpecifierSet
from trl import GRPOConfig


logger = logging.getLogger(__name__)

TESTED = ("1.16.0",)
"""Releases that the whole test suite has passed with, oldest first. The README names them."""
RANGE = ">=1.16,<2"
"""Releases that are accepted, if the checks find in them what is used; the same as in pyproject.toml."""

# Options of `GRPOConfig` that `UniGRPOConfig` gives other defaults, and further ones that are read.
OPTIONS = (
    *("adam_epsilon", "bf16", "dataloader_pin_memory", "ddp_find_unused_parameters", "disable_dropout"),
    *("gradient_accumulation_steps", "learning_rate", "log_multimodal", "loss_type", "max_completion_length"),
    *("num_generations", "num_iterations", "per_device_eval_batch_size", "per_device_train_batch_size"),
    "multi_objective_aggregation",
    *("beta", "cast_lm_head_to_fp32", "generation_batch_size", "log_completions", "model_init_kwargs"),
    *(
        "multi_objective_aggregation",
        "num_generations_eval",
        "remove_unused_columns",
        "reward_weights",
        "steps_per_generation",
        "temperature",
        "use_vllm",
        "vllm_mode",
    ),
)


class TRLChangedError(RuntimeError):
    """The installed TRL is not one that this version of trl-unigrpo was written for."""

    def __init__(self, what: str):
        super().__init__(
            f"TRL {trl.__version__} is not what trl-unigrpo was written for: {what}. It was tested with TRL "
            f"{', '.join(TESTED)}, and takes others of trl{RANGE} as long as they have what it uses. Install one that "
            f"was tested (pip install 'trl=={TESTED[-1]}'), or a newer trl-unigrpo."
        )


def check_options() -> None:
    """Raise [`TRLChangedError`] if the release is out of range, or an option is gone: ours would have no effect."""
    if not SpecifierSet(RANGE).contains(trl.__version__, prereleases=True):
        raise TRLChangedError(f"expected trl{RANGE}")
    for name in OPTIONS:
        if name not in GRPOConfig.__dataclass_fields__:
            raise TRLChangedError(f"GRPOConfig has no option {name}")


@cache
def note_untested(release: str) -> None:
    """Log, once and on the first process, that a release was not tested."""
    if release not in TESTED and os.environ.get("RANK", "0") == "0":
        logger.warning("TRL %s was not tested with trl-unigrpo (%s was), but has what it uses.", release, TESTED[-1])
