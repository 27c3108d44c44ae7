"""Engines that spread one model over several devices: which of them a trainer can run under."""

import os
from typing import Any

import torch


ENGINES = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}


def asks_for(config: Any, engine: str) -> str | None:
    """Say who switched an engine of [`ENGINES`] on: the arguments, or `accelerate launch` by its environment."""
    if value := getattr(config, engine, None):
        return f"{engine}={value!r}"
    if os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() in ("1", "true"):
        return f"{ENGINES[engine]}, which `accelerate launch` was told to use,"
    return None


def settle_engine(config: Any, shards: bool = False) -> None:
    """
    Settle what a run is spread over, before transformers reads it.

    Args:
        config: the arguments. Where there are CPUs alone they are told so, or processes would not find each other.
        shards: whether the trainer runs under FSDP2.

    Raises:
        ValueError: for an engine that the trainer can't run under, whoever switched it on.
    """
    config.use_cpu = config.use_cpu or not torch.accelerator.is_available()
    plain = "plain data parallelism (`accelerate launch --multi_gpu`)"
    ways = f"FSDP2 (examples/accelerate/fsdp2.yaml), or {plain}" if shards else f"one process, or {plain}"
    if (asked := asks_for(config, "deepspeed")) is not None:
        raise ValueError(
            f"{asked} is not supported: it hides the gradients that are clipped expert by expert, so that one expert "
            f"would train at another rate in silence. Use {ways}."
        )
    if not shards and (asked := asks_for(config, "fsdp")) is not None:
        raise ValueError(
            f"{asked} is not supported by this trainer: parts of the model are called outside of its wrapper. Use "
            f"{ways}."
        )
