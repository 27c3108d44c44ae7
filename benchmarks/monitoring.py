"""CPU time of the alarms of one training step, against the share that they may have.

    python benchmarks/monitoring.py

24 pictures of 512 x 512 pixels and their thinkings of 300 words, a generation of one prompt, in one thread:
statistics, twins, rewards, thinkings; and the tripwire of the two updates that are made of it. Such a generation takes
at least 23 s on a large GPU (docs/doctor.md); about 1 % of it, 0.25 s, is for alarms and galleries together, half of
that for the alarms.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from transformers import TrainerControl, TrainerState

from trl_unigrpo import UniGRPOConfig
from trl_unigrpo.monitoring.alarms import Alarms
from trl_unigrpo.monitoring.events import Generation, Update
from trl_unigrpo.monitoring.image_statistics import image_statistics
from trl_unigrpo.monitoring.thinking_alarms import repetition


RESULTS = Path(__file__).parent / "results" / "monitoring.json"
LIMIT = 0.125  # seconds


def picture(random: np.random.Generator, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = random.integers(0, size, 3).tolist()
        draw.ellipse((x, y, x + r // 2, y + r // 2), fill=tuple(random.integers(0, 256, 3).tolist()))
    noise = random.normal(0, 10, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def generation(number: int, size: int, seed: int) -> Generation:
    random = np.random.default_rng(seed)
    words = [f"word{i}" for i in range(2000)]
    return Generation(
        mode="train",
        group_size=number,
        prompts=[f"prompt {seed}"] * number,
        thinking=[" ".join(random.choice(words, 300)) for _ in range(number)],
        images=[picture(random, size) for _ in range(number)],
        rewards={"judge": random.uniform(0, 1, number).tolist()},
        advantages=random.normal(0, 1, number).tolist(),
        extra={},
        weights={"judge": 1.0},
    )


def seconds(function: Callable[[], Any]) -> float:
    """CPU time of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def machine() -> str:
    """Name of the processor, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(number: int, size: int, repeats: int) -> dict[str, float]:
    """Part -> median of its CPU seconds."""
    generations = [generation(number, size, seed) for seed in range(repeats)]
    parts: dict[str, list[float]] = {"statistics of the pictures": [], "repetition of the thinkings": [], "all": []}
    with tempfile.TemporaryDirectory() as folder:
        args = UniGRPOConfig(output_dir=folder, num_generations=number, report_to="none", use_cpu=True, bf16=False)
        state, control, alarms = TrainerState(), TrainerControl(), Alarms()
        alarms.on_train_begin(args, state, control)
        update = Update({"text": 0.3, "image": 0.005}, {"flow/velocity_mse": 0.01, "flow/log_ratio_std": 1e-5})

        def step(seen: Generation) -> None:
            alarms.on_generation(args, state, control, generation=seen, metrics={})
            for _ in range(args.num_iterations):
                alarms.on_update(args, state, control, update=update)

        for seen in generations:
            parts["statistics of the pictures"].append(seconds(lambda: [image_statistics(i) for i in seen.images]))  # noqa: B023
            parts["repetition of the thinkings"].append(seconds(lambda: [repetition(t) for t in seen.thinking]))  # noqa: B023
            parts["all"].append(seconds(lambda: step(seen)))  # noqa: B023
    return {name: statistics.median(values) for name, values in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.pictures, arguments.size, arguments.repeats)
    table = Table("part", "CPU seconds", f"of {LIMIT} s")
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}", f"{value / LIMIT:.0%}")
    Console().print(table)
    result = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/monitoring.py", *sys.argv[1:]]),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "pillow")},
        "pictures": arguments.pictures,
        "size": arguments.size,
        "repeats": arguments.repeats,
        "limit_seconds": LIMIT,
        "cpu_seconds": found,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
