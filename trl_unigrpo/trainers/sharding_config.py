"""The options of a model that FSDP2 spreads over processes, and what is refused of them."""

import os
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy

from ..models.sharding import layer_classes
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
    """Raise ValueError for what FSDP2 can't do, whoever switched it on: it is told before a model is loaded."""
    asked = asks_for(config, "fsdp")
    if asked is None:
        return
    plugin = FullyShardedDataParallelPlugin(**config.fsdp_plugin_args or {})
    if plugin.fsdp_version != 2:
        raise ValueError(f"{asked} means FSDP version {plugin.fsdp_version}: set fsdp_version: 2.")
    refused = {
        "parallelism_config": (
            bool(getattr(config, "parallelism_config", None) or os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG")),
            "images are sampled past what would spread them. Leave it out",
        ),
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "weights are used outside of FSDP's own calls. Set reference_on_cpu=True, or take more processes",
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing,
            "it renames the weights. Set gradient_checkpointing=True instead, which does the same",
        ),
        "cast_lm_head_to_fp32": (
            config.cast_lm_head_to_fp32,
            "FSDP2 gathers the language head in the precision of all weights. Leave it False",
        ),
        f"num_rounds={config.num_rounds}": (
            config.most_rounds > 1,
            "processes read other numbers of images in an update. Use plain data parallelism",
        ),
        "gather_for_rollout=False without image_batch_size": (
            not config.gather_for_rollout and config.image_batch_size is None,
            "each process would paint as many images at once as its own memory holds, and wait for calls that the "
            "others don't make. Set image_batch_size",
        ),
    }
    for what, (is_so, reason) in refused.items():
        if is_so:
            raise ValueError(f"{what} is not supported with {asked.rstrip(',')}: {reason}.")


def check_sharded(base: Any, asked: bool, readers: bool, stories: bool) -> None:
    """
    Raise ValueError for a model that FSDP2 can't spread, and for what a run does with it.

    Args:
        asked: whether it is to be spread.
        readers: whether rewards read with the model itself.
        stories: whether prompts have several turns.
    """
    if not asked:
        return
    name, weights = type(base).__name__, dict(base.named_parameters(remove_duplicate=False))
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    classes = [*base.gathered_layers] or layer_classes(base)
    layers = [path for path, module in base.named_modules(remove_duplicate=False) if type(module).__name__ in classes]
    units: dict[Tensor, set[str]] = {part.weight: {"together"} for part in ends if part is not None}
    for key, weight in weights.items():
        of = units.setdefault(weight, set())
        if of != {"together"}:
            of.add(next((path for path in layers if key.startswith(f"{path}.")), ""))
    shared = [key for key, weight in weights.items() if len(units[weight]) > 1]
    refused = {
        f"{name} has weights that two of its layers share, such as {shared[:1]}": bool(shared),
        f"{name} is quantized": any(not weight.is_floating_point() for weight in weights.values()),
        "A reward that reads with the model itself": readers,
        "A dataset with a column 'turns'": stories,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"{what}: that is not supported with FSDP2. Use plain data parallelism, with adapters.")
