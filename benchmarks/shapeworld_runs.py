"""Joint training against each expert alone, and against supervised training for the same time, on ShapeWorld.

    python benchmarks/shapeworld_runs.py --methods unigrpo text image sft --seeds 0 1 2

Every method starts from the shipped base model and is scored on the same held-out prompts with the same noise. Equal
rollouts for the three reinforcement learners; `sft` goes on with the pre-training corpus for as long as `unigrpo` of
that seed took.
One line per run is appended to results/shapeworld_runs.jsonl; runs that are there already are not repeated.
"""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, set_seed

from trl_unigrpo import UnifiedSFTConfig, UnifiedSFTTrainer, UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.evaluation.statistics import mean_interval
from trl_unigrpo.shapeworld import demo_settings, evaluate_model, load_base, shapeworld_dataset, shapeworld_reward
from trl_unigrpo.shapeworld.corpus import pretraining_corpus
from trl_unigrpo.shapeworld.demo import quiet
from trl_unigrpo.shapeworld.evaluate import group_diversity


METHODS: dict[str, dict[str, Any]] = {
    "unigrpo": {},
    "text": {"flow_weight": 0.0},
    "image": {"text_weight": 0.0},
    "sft": {},
}
RESULTS = Path(__file__).parent / "results" / "shapeworld_runs.jsonl"


class StopAfter(TrainerCallback):
    """Ends training after a number of seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.perf_counter() - self.started > self.seconds


def train(
    model: Any, tokenizer: Any, method: str, seed: int, steps: int, seconds: float, overrides: dict[str, Any]
) -> float:
    """Train in place; returns the seconds it took."""
    output = f"/tmp/shapeworld-{method}-{seed}"
    if method == "sft":
        args = UnifiedSFTConfig(
            output_dir=output,
            seed=seed,
            max_steps=10_000,
            per_device_train_batch_size=96,
            noise_draws=3,
            timestep_sampling="uniform",
            timestep_shift=4.0,
            lr_scheduler_type="constant",
            adam_beta2=0.98,
            weight_decay=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{"learning_rate": 2e-4, **overrides},
        )
        corpus = pretraining_corpus(300_000, seed=1000 + seed)
        trainer = UnifiedSFTTrainer(
            model=model, args=args, train_dataset=corpus, processing_class=tokenizer, callbacks=[StopAfter(seconds)]
        )
    else:
        settings = {**demo_settings(steps), **METHODS[method], **overrides}
        trainer = UniGRPOTrainer(
            model=model,
            reward_funcs=shapeworld_reward,
            args=UniGRPOConfig(output_dir=output, seed=seed, disable_tqdm=True, **settings),
            train_dataset=shapeworld_dataset("train", seed=seed),
            processing_class=tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def run(
    method: str, seed: int, steps: int, split: str, num_prompts: int, seconds: float, overrides: dict[str, Any]
) -> dict[str, Any]:
    """One training run, scored before and after."""
    set_seed(seed)
    model, tokenizer = load_base()
    sampled = evaluate_model(model, tokenizer, num_prompts, split)
    greedy = evaluate_model(model, tokenizer, num_prompts, split, do_sample=False)
    took = train(model, tokenizer, method, seed, steps, seconds, overrides)
    sampled_after = evaluate_model(model, tokenizer, num_prompts, split)
    greedy_after = evaluate_model(model, tokenizer, num_prompts, split, do_sample=False)
    gain = mean_interval(sampled_after.reward - sampled.reward, sampled.prompts)
    greedy_gain = mean_interval(greedy_after.reward - greedy.reward, greedy.prompts)
    return {
        "method": method,
        "seed": seed,
        "steps": steps,
        "split": split,
        "overrides": overrides,
        "n": num_prompts,
        "before": float(sampled.reward.mean()),
        "after": float(sampled_after.reward.mean()),
        "gain": list(gain[:3]),
        "greedy_before": float(greedy.reward.mean()),
        "greedy_after": float(greedy_after.reward.mean()),
        "greedy_gain": list(greedy_gain[:3]),
        "strict_after": float(sampled_after.strict.mean()),
        "picture_error": [float(sampled.error.mean()), float(sampled_after.error.mean())],
        "diversity_after": vars(group_diversity(model, tokenizer)),
        "train_seconds": took,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table("method", "seeds", "after", "gain", "95 % (worst seed)", "greedy gain", "picture error", "seconds")
    for method in METHODS:
        chosen = [row for row in rows if row["method"] == method]
        if chosen:
            mean = lambda key, chosen=chosen: np.mean([row[key] for row in chosen], axis=0)  # noqa: E731
            worst = min(chosen, key=lambda row: row["gain"][1])["gain"]
            out.add_row(
                method,
                " ".join(str(row["seed"]) for row in chosen),
                f"{mean('after'):.3f}",
                f"{mean('gain')[0]:+.3f}",
                f"{worst[1]:+.3f} to {worst[2]:+.3f}",
                f"{mean('greedy_gain')[0]:+.3f}",
                "{:.4f} -> {:.4f}".format(*mean("picture_error")),
                f"{mean('train_seconds'):.0f}",
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=140, help="rollouts of 192 trajectories")
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="choose settings on validation only"
    )
    parser.add_argument("--num-prompts", type=int, default=1050)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings, for a search")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    quiet()
    overrides = {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)}
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []

    def key(row: dict[str, Any]) -> str:
        return json.dumps(
            [row[name] for name in ("method", "seed", "steps", "split", "n", "overrides")], sort_keys=True
        )

    for seed in args.seeds:
        for method in args.methods:
            wanted = {"method": method, "seed": seed, "steps": args.steps, "split": args.split, "n": args.num_prompts}
            wanted["overrides"] = overrides
            if any(key(row) == key(wanted) for row in rows):
                continue
            seconds = next(
                (row["train_seconds"] for row in rows if row["method"] == "unigrpo" and row["seed"] == seed), 180.0
            )
            row = run(method, seed, args.steps, args.split, args.num_prompts, seconds, overrides)
            rows.append(row)
            with args.results.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    Console().print(table([row for row in rows if row["split"] == args.split and row["overrides"] == overrides]))


if __name__ == "__main__":
    main()
