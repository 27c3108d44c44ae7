"""CPU time of the alarms and the gallery of one generation, against the share that they may have.

    python benchmarks/monitoring.py

24 images of 512 x 512 pixels and their thinkings of 300 words, a generation of one prompt, in one thread:
statistics, twins, rewards, thinkings; the tripwire of the two updates that are made of it; the gallery's images and
its page. Such a generation takes at least 23 s on a large GPU (docs/doctor.md); about 1 % of it, 0.25 s, is for alarms
and galleries together. The gallery shows one generation in 25 (`gallery_steps=50`, two steps each), and works beside
the training, in a thread of its own.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
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
from trl_unigrpo.monitoring.metrics import LOGGED_METRICS
from trl_unigrpo.monitoring.thinking_alarms import repetition
from trl_unigrpo.reporting.gallery import Gallery
from trl_unigrpo.reporting.run_page import write_report


RESULTS = Path(__file__).parent / "results" / "monitoring.json"
LIMIT = 0.25  # seconds
SHOWN = 25  # generations of which one is shown


def noisy_image(random: np.random.Generator, size: int) -> Image.Image:
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
    images = [noisy_image(random, size) for _ in range(number)]
    return Generation(
        mode="train",
        group_size=number,
        prompts=[f"prompt {seed}"] * number,
        thinking=[" ".join(random.choice(words, 300)) for _ in range(number)],
        images=images,
        statistics=[image_statistics(image) for image in images],
        rewards={"judge": random.uniform(0, 1, number).tolist()},
        advantages=random.normal(0, 1, number).tolist(),
        extra={},
        weights={"judge": 1.0},
    )


def seconds(function: Callable[[], Any]) -> float:
    """Measure the CPU time of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def machine() -> str:
    """Name the processor, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(number: int, size: int, repeats: int) -> dict[str, float]:
    """Measure each part: its name -> median of its CPU seconds."""
    generations = [generation(number, size, seed) for seed in range(repeats)]
    names = ("alarms: images", "alarms: thinkings", "alarms", "gallery: a shown generation", "gallery: a page")
    parts: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_generations": number, "report_to": "none", "use_cpu": True, "bf16": False}
        args = UniGRPOConfig(output_dir=folder, gallery_steps=1, **settings)
        state, control, alarms, gallery = TrainerState(max_steps=10**6), TrainerControl(), Alarms(), Gallery()
        state.is_world_process_zero = True
        alarms.on_train_begin(args, state, control)
        update = Update({"text": 0.3, "image": 0.005}, {"flow/velocity_mse": 0.01, "flow/log_ratio_std": 1e-5})

        def step(seen: Generation) -> None:
            seen = replace(seen, statistics=[image_statistics(image) for image in seen.images])  # as the trainer does
            alarms.on_generation(args, state, control, generation=seen, metrics={})
            for _ in range(args.num_iterations):
                alarms.on_update(args, state, control, update=update)

        def show(seen: Generation) -> None:
            gallery.on_generation(args, state, control, generation=seen, metrics={})
            gallery.on_log(args, state, control, logs=dict.fromkeys(LOGGED_METRICS, 0.5))
            gallery.wait()

        for state.global_step, seen in enumerate(generations):
            parts["alarms: images"].append(seconds(lambda: [image_statistics(i) for i in seen.images]))  # noqa: B023
            parts["alarms: thinkings"].append(seconds(lambda: [repetition(t) for t in seen.thinking]))  # noqa: B023
            parts["alarms"].append(seconds(lambda: step(seen)))  # noqa: B023
            parts["gallery: a shown generation"].append(seconds(lambda: show(seen)))  # noqa: B023
            parts["gallery: a page"].append(seconds(lambda: write_report([folder])))
    found = {name: statistics.median(values) for name, values in parts.items()}
    shown = found["gallery: a shown generation"] + found["gallery: a page"]
    return {**found, "all, on average over generations": found["alarms"] + shown / SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.images, arguments.size, arguments.repeats)
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
        "images": arguments.images,
        "size": arguments.size,
        "repeats": arguments.repeats,
        "limit_seconds": LIMIT,
        "cpu_seconds": found,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
