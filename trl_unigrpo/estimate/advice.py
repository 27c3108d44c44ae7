"""Advice on what to change, in which order, where a run does not fit into memory."""

import math
from dataclasses import dataclass, replace

from .memory import estimate_memory
from .workload import Workload


@dataclass(frozen=True)
class Advice:
    """One change: what to set, and the workload with it and all changes before it."""

    setting: str
    workload: Workload
    peak: int


def advise(load: Workload, limit: int) -> list[Advice]:
    """
    Find changes, each on top of those before, until the peak is at most `limit` bytes or none of those left lowers
    it. The next one is always the first of the list that does.
    """
    found: list[Advice] = []
    peak = estimate_memory(load).peak
    while peak > limit:
        changed = ((setting, replace(load, **change)) for setting, change in _changes(load))
        lower = ((setting, after, estimate_memory(after).peak) for setting, after in changed)
        best = next((Advice(*item) for item in lower if item[2] < peak), None)
        if best is None:
            break
        found.append(best)
        load, peak = best.workload, best.peak
    return found


def _changes(load: Workload) -> list[tuple[str, dict]]:
    """List changes in the order of their cost: first time, then precision, then what is learned."""
    unit = load.config.pixels_per_token
    changes: list[tuple[str, dict]] = []
    if load.processes > 1 and load.quantization is None:
        changes.append(("FSDP2: examples/accelerate/fsdp2.yaml", {"fsdp": True}))
    if load.fsdp and not load.sync_each_batch:
        changes.append(("sync_each_batch in accelerator_config", {"sync_each_batch": True}))
    if load.lora_ranks is None:
        changes.append(
            ("adapters instead of full fine-tuning: LoraConfig(r=32, lora_alpha=64)", {"lora_ranks": (32, 32)})
        )
    changes += [
        ("ema_decay=None", {"ema": False}),
        ("gradient_checkpointing=True", {"gradient_checkpointing": True}),
        ("image_batch_size=1", {"image_batch_size": 1}),
        ("per_device_train_batch_size=1", {"micro_batch_size": 1}),
    ]
    if load.fsdp:
        changes.append(("gather_for_rollout=False", {"gather_for_rollout": False}))
    else:
        changes.append(("nf4 weights: --load_in_4bit", {"quantization": "nf4"}))
    for size in (512, 256):
        if size**2 < math.prod(load.size) and size % unit == 0:
            changes.append((f"image_size={size}", {"image_size": size}))
    return [*changes, ("sde_window_size=1", {"sde_window_size": 1})]
