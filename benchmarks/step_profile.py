"""The demo's training time by where it goes: the model, the optimizer, the reward, and what lies around them.

    python benchmarks/step_profile.py --rollouts 10
    python benchmarks/step_profile.py --processes 2    # what FSDP2 costs beside DDP: sharding.py

Overhead is the time outside of the model's forward and backward passes (language head and VAE included), the optimizer
and the reward. The Python part of `generate`, which belongs to transformers, is reported apart.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sharding import compare
from transformers import PrinterCallback

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.experiments.demo.demo import quiet
from trl_unigrpo.shapeworld import (
    demo_settings,
    load_base,
    shapeworld_dataset,
    shapeworld_reward,
)


RESULTS = Path(__file__).parent / "results"


class Stopwatch:
    """A stopwatch that adds up seconds per name; time inside a watched call counts for the innermost name only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        watched.__name__ = getattr(function, "__name__", name)
        return watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=10, help="rollouts of 192 trajectories")
    parser.add_argument("--processes", type=int, default=1, help="above 1: compare FSDP2 with DDP instead")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if arguments.processes > 1:
        compare_engines(arguments.processes, arguments.rollouts, arguments.results)
        return
    arguments.results = arguments.results or RESULTS / "step_profile.json"
    quiet()
    watch = Stopwatch()
    model, tokenizer = load_base()
    with tempfile.TemporaryDirectory() as folder:
        trainer = UniGRPOTrainer(
            model=model,
            reward_funcs=watch.watch(shapeworld_reward, "reward"),
            args=UniGRPOConfig(output_dir=folder, disable_tqdm=True, **demo_settings(arguments.rollouts)),
            train_dataset=shapeworld_dataset("train"),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()
        for name in ("backbone", "packed_forward", "encode_context", "predict_velocity", "predict_velocities"):
            setattr(trainer.unified, name, watch.watch(getattr(trainer.unified, name), "model"))
        decoder = trainer.unified.language_model.model
        decoder.forward = watch.watch(decoder.forward, "model")
        head = trainer.unified.forward
        trainer.unified.forward = watch.watch(head, "model")
        trainer.unified.codec.decode = watch.watch(trainer.unified.codec.decode, "model")
        trainer.unified.generate = watch.watch(trainer.unified.generate, "generate's Python")
        trainer.accelerator.backward = watch.watch(trainer.accelerator.backward, "model")
        trainer.optimizer.step = watch.watch(trainer.optimizer.step, "optimizer")
        run = watch.watch(trainer.train, "overhead")
        run()
    total = sum(watch.seconds.values())
    table = Table("part", "seconds", "share")
    for name, value in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.2f}", f"{value / total:.1%}")
    Console().print(table)
    shares = {name: value / total for name, value in watch.seconds.items()}
    result = {"date": str(date.today()), "steps": arguments.rollouts, "seconds": total, "shares": shares}
    arguments.results.write_text(json.dumps({**result, "threads": torch.get_num_threads()}, indent=2) + "\n")


def compare_engines(processes: int, rollouts: int, results: Path | None) -> None:
    """Print and keep what FSDP2 costs beside DDP."""
    found = compare(processes, rollouts)
    table = Table("", "s outside of collectives", "s inside")
    for engine in ("ddp", "fsdp2"):
        table.add_row(engine, f"{found[engine]['outside']:.2f}", f"{found[engine]['inside']:.2f}")
    Console().print(table, f"FSDP2 takes {found['overhead']:+.1%} outside of collectives.")
    result = {"date": str(date.today()), "processes": processes, "rollouts": rollouts, **found}
    file = results or RESULTS / "sharding.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
