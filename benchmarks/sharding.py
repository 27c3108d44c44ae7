"""Measure the time that FSDP2 costs outside of its collectives, against DDP: the demo's training on CPUs.

    python benchmarks/step_profile.py --processes 2

Time is that of each process' own thread on its core, so that waiting counts nothing, after the first optimizer step.
What is spent inside of a call of torch.distributed is left out: what remains is the work, and what FSDP2 adds to it in
Python and in copies.
"""

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import PrinterCallback, TrainerCallback

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.experiments.demo.demo import quiet
from trl_unigrpo.shapeworld import demo_settings, load_base, shapeworld_dataset, shapeworld_reward


COLLECTIVES = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
COLLECTIVES += ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def compare(processes: int, rollouts: int) -> dict[str, Any]:
    """
    Train under DDP and under FSDP2, in turns.

    Returns:
        Seconds outside and inside of collectives of each engine, of its slowest process.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("ddp", "fsdp2"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(_train, args=(processes, port, engine, rollouts, folder), nprocs=processes)
            seconds = [torch.load(Path(folder) / f"{engine}-{rank}.pt") for rank in range(processes)]
            found[engine] = {name: max(one[name] for one in seconds) for name in ("outside", "inside")}
    found["overhead"] = found["fsdp2"]["outside"] / found["ddp"]["outside"] - 1
    return found


def _train(rank: int, processes: int, port: int, engine: str, rollouts: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **(FSDP2 if engine == "fsdp2" else {}))
    torch.set_num_threads(1)
    quiet()
    inside = _watch_collectives()
    model, tokenizer = load_base()
    settings = demo_settings(rollouts)
    settings["per_device_train_batch_size"] //= processes
    trainer = UniGRPOTrainer(
        model=model,
        reward_funcs=shapeworld_reward,
        args=UniGRPOConfig(output_dir=folder, disable_tqdm=True, gallery_steps=0, **settings),
        train_dataset=shapeworld_dataset("train"),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    begin = AfterFirstStep(inside)
    trainer.add_callback(begin)
    trainer.train()
    seconds = time.thread_time() - begin.time
    torch.save({"outside": seconds - sum(inside), "inside": sum(inside)}, Path(folder) / f"{engine}-{rank}.pt")
    dist.destroy_process_group()


class AfterFirstStep(TrainerCallback):
    """Begin to count when all has been set up."""

    def __init__(self, inside: list[float]):
        self.inside, self.time = inside, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.inside.clear()
            self.time = time.thread_time()


def _watch_collectives() -> list[float]:
    """Add up what this thread spends in each call of a collective."""
    spent: list[float] = []
    depth = 0

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth, begin = depth + 1, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    spent.append(time.thread_time() - begin)

        return call

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, watched(getattr(dist, name)))
    return spent
