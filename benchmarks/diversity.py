"""Diversity after training on ShapeWorld, and what keeps it: a text KL, an entropy bonus, diversity-aware advantages.

    python benchmarks/diversity.py
    python benchmarks/diversity.py --sets fast/off fast/text --seeds 0 1 2
    python benchmarks/diversity.py --table                                     what was measured, no run

One thread a run, one run at a time; seconds are those of the processor. The model is scored on 700 validation prompts,
and on 16 images of each of 40. Each run is written as soon as it is done, and not made again.
"""

import argparse
import json
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, set_seed

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.__about__ import versions
from trl_unigrpo.experiments.demo.demo import quiet
from trl_unigrpo.monitoring.alarm import read_alarms
from trl_unigrpo.shapeworld import load_base, shapeworld_dataset, shapeworld_reward
from trl_unigrpo.shapeworld.evaluate import evaluate_model, group_diversity
from trl_unigrpo.shapeworld.settings import demo_settings, fast_settings


RESULTS = Path(__file__).parent / "results" / "diversity.jsonl"
SPLIT, PROMPTS, PER_CATEGORY = "validation", 700, 20
BASES = {
    "fast": fast_settings(50) | {"diversity_weight": 0.0},
    "long": fast_settings(135) | {"diversity_weight": 0.0},
    "paper": demo_settings(70),
}
CHANGES: dict[str, dict[str, Any]] = {
    "off": {},
    "beta.01": {"beta": 0.01},
    "beta.04": {"beta": 0.04},
    "entropy.01": {"entropy_coef": 0.01},
    "half": {"diversity_weight": 0.5},
    "text": {"diversity_weight": 1.0},
    "both": {"diversity_weight": 1.0, "diversity_experts": "both"},
}
SETS = {f"{base}/{change}": BASES[base] | CHANGES[change] for base in BASES for change in CHANGES}


def scores(model: Any, tokenizer: Any) -> dict[str, float]:
    """Score a model: its reward, the image error, and how much the images of a prompt differ."""
    found = evaluate_model(model, tokenizer, PROMPTS, split=SPLIT)
    diversity = group_diversity(model, tokenizer, split=SPLIT, per_category=PER_CATEGORY)
    return {"reward": float(found.reward.mean()), "error": float(found.error.mean()), **vars(diversity)}


def measure(name: str, seed: int) -> dict[str, Any]:
    """Make a run: its scores, its seconds, and which alarms it gave after how many steps."""
    set_seed(seed)
    model, tokenizer = load_base()
    with TemporaryDirectory() as folder:
        plain = {"disable_tqdm": True, "gallery_steps": 0, "alarms": "warn"}
        trainer = UniGRPOTrainer(
            model=model,
            reward_funcs=shapeworld_reward,
            args=UniGRPOConfig(output_dir=folder, seed=seed, **SETS[name] | plain),
            train_dataset=shapeworld_dataset("train", None, seed),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        alarms = [[alarm["step"], alarm["alarm"]] for alarm in read_alarms(folder)]
    last = [row for row in trainer.state.log_history if "reward" in row][-5:]
    return {
        "name": name,
        "seed": seed,
        **scores(model, tokenizer),
        "twins": float(np.mean([row["images/twins"] for row in last])),
        "entropy": float(np.mean([row["entropy"] for row in last])),
        "seconds": round(seconds, 1),
        "alarms": alarms,
        "settings": SETS[name],
        "date": str(date.today()),
        "versions": versions(),
    }


def read(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        yield from map(json.loads, file.read_text("utf-8").splitlines())


def table(file: Path) -> Table:
    """Make the table of all that was measured; several seeds stand side by side."""
    shown = Table(title=f"{PROMPTS} {SPLIT} prompts")
    columns = {"reward": ".3f", "error": ".4f", "distinct_images": ".2f", "position_entropy": ".2f", "twins": ".2f"}
    for name in ("settings", "seeds", *columns, "alarms", "seconds"):
        shown.add_column(name)
    rows = list(read(file))
    for name in dict.fromkeys(row["name"] for row in rows):
        runs = sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"])
        numbers = [", ".join(format(run[key], form) for run in runs if key in run) for key, form in columns.items()]
        alarms = ", ".join(" ".join(dict.fromkeys(alarm for _, alarm in run["alarms"])) or "-" for run in runs)
        seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs)
        shown.add_row(name, ", ".join(str(run["seed"]) for run in runs), *numbers, alarms, seconds)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS], help="settings to measure")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trainings")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file that runs are added to")
    parser.add_argument("--table", action="store_true", help="show what was measured, and make no run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    rows = list(read(given.output))
    done = {(row["name"], row["seed"]) for row in rows}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("a", encoding="utf-8") as out:
        if not rows:
            base = {"name": "base", "seed": 0, **scores(*load_base()), "seconds": 0.0, "alarms": []}
            print(json.dumps(base), file=out, flush=True)
        for name, seed in [(name, seed) for seed in given.seeds for name in given.sets]:
            if not given.table and (name, seed) not in done:
                print(json.dumps(measure(name, seed)), file=out, flush=True)
    Console(width=200).print(table(given.output))


if __name__ == "__main__":
    main()
