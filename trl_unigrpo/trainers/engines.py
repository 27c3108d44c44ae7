"""Engines that spread one model over several devices, and are refused: calls go past their wrappers here."""

import os
from typing import Any


ENGINES = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}


def check_engine(config: Any) -> None:
    """
    Raise ValueError for an engine that shards weights or gradients, whoever switched it on: the arguments, or
    `accelerate launch` by its environment.

    Sharded gradients can't be clipped expert by expert, so that one of them would train at another rate in silence.
    """
    for field, name in ENGINES.items():
        if value := getattr(config, field, None):
            asked = f"{field}={value!r}"
        elif os.environ.get(f"ACCELERATE_USE_{field.upper()}", "false").lower() in ("1", "true"):
            asked = f"{name}, which `accelerate launch` was told to use,"
        else:
            continue
        raise ValueError(
            f"{asked} is not supported: parts of the model are called outside of its wrapper, and gradients are "
            "clipped expert by expert. Use one process, or plain data parallelism (`accelerate launch --multi_gpu`)."
        )
