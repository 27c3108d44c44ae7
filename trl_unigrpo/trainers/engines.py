"""Engines that spread one model over several devices: which of them a trainer can run under."""

import os
from typing import Any


ENGINES = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}


def asks_for(config: Any, engine: str) -> str | None:
    """Say who switched an engine of [`ENGINES`] on: the arguments, or `accelerate launch` by its environment."""
    if value := getattr(config, engine, None):
        return f"{engine}={value!r}"
    if os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() in ("1", "true"):
        return f"{ENGINES[engine]}, which `accelerate launch` was told to use,"
    return None


def check_engine(config: Any, shards: bool = False) -> None:
    """
    Raise ValueError for an engine that a trainer can't run under, whoever switched it on.

    Args:
        shards: whether the trainer runs under FSDP2.
    """
    asked = asks_for(config, "deepspeed")
    if asked is not None:
        raise ValueError(
            f"{asked} is not supported: it hides the gradients that are clipped expert by expert, so that one expert "
            f"would train at another rate in silence. Use {_ways(shards)}."
        )
    asked = asks_for(config, "fsdp")
    if asked is None:
        return
    if not shards:
        raise ValueError(
            f"{asked} is not supported by this trainer: parts of the model are called outside of its wrapper. "
            f"Use {_ways(shards)}."
        )
    own = config.fsdp_config if isinstance(config.fsdp_config, dict) else {}
    version = int(own.get("version", 2) if config.fsdp else os.environ.get("FSDP_VERSION", 1))
    if version != 2:
        raise ValueError(f"{asked} means FSDP version {version}: only version 2 is supported. Set fsdp_version: 2.")


def _ways(shards: bool) -> str:
    plain = "plain data parallelism (`accelerate launch --multi_gpu`)"
    return f"FSDP2 (examples/accelerate/fsdp2.yaml), or {plain}" if shards else f"one process, or {plain}"
