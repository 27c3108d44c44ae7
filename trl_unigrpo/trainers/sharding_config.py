"""The options of a model that FSDP2 spreads over processes, and what is refused of them."""

from dataclasses import dataclass, field
from typing import Any

from .engines import asks_for


@dataclass
class ShardingConfig:
    r"""
    Options of [`UniGRPOConfig`] for a model whose weights are spread over processes by FSDP2 (docs/scale.md). They do
    nothing without it.

    Parameters:
        > Parameters that control FSDP2

        gather_for_rollout (`bool`, *optional*, defaults to `True`):
            Whether each process holds all weights while it thinks and paints: for BAGEL 29 GB in bf16, less than an
            update needs. Without, they travel at every token and every denoising step.
        reference_on_cpu (`bool`, *optional*, defaults to `False`):
            Whether a process keeps its slice of the reference model in the CPU's memory. Only full fine-tuning has
            one: adapters are switched off instead.
    """

    gather_for_rollout: bool = field(
        default=True,
        metadata={"help": "FSDP2: whether each process holds all weights while it thinks and paints."},
    )
    reference_on_cpu: bool = field(
        default=False,
        metadata={"help": "FSDP2, full fine-tuning: whether the slice of the reference model is on the CPU."},
    )


def check_sharding(config: Any) -> None:
    """Raise ValueError for what FSDP2 can't do, whoever switched it on."""
    asked = asks_for(config, "fsdp")
    if asked is None:
        return
    if config.cast_lm_head_to_fp32:
        raise ValueError(
            f"cast_lm_head_to_fp32=True with {asked} is not supported: FSDP2 gathers the language head in the "
            "precision of all weights. Leave it False."
        )
    if config.gather_for_rollout:
        return
    # Processes that gather at each call have to make equally many of them.
    if config.image_batch_size is None:
        raise ValueError(
            f"gather_for_rollout=False with {asked} needs image_batch_size: else each process paints as many images "
            "at once as its own free memory holds, and waits for calls that the others don't make."
        )
    if config.most_rounds > 1:
        raise ValueError(
            f"gather_for_rollout=False with num_rounds={config.num_rounds} and {asked} is not supported: processes "
            "have different numbers of images in later rounds. Leave it True."
        )
