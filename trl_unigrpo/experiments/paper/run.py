"""One run of the grid in its own process: train, score, write its folder.

    python -m trl_unigrpo.experiments.paper.run OUTPUT SYSTEM --seed 0

`run.json` is written last: a folder without it is of a run that did not finish, and is made again from the start.
Everything in it but times, date and machine follows from the system, the seed and the settings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed

from ...__about__ import versions
from ...models.bagel import BagelForUnifiedGeneration
from ...monitoring.files import replace_file
from ...shapeworld import BASE, SEEING_BASE
from ...shapeworld.evaluate import group_diversity
from ..demo.demo import quiet
from .chosen import load_chosen
from .jobs import Job
from .scoring import (
    evaluate_in_mode,
    sample_traces,
    strip,
    summary,
    validation_scores,
)
from .systems import (
    CHOSEN,
    FULL,
    SYSTEMS,
    TRACED,
    Scale,
    Settings,
    is_start,
)
from .training import make_trainer, make_validation, rollouts, run_settings
from .validation import VALIDATION_PROMPTS


def run_job(job: Job, output: Path, scale: Scale, settings: Settings) -> dict[str, Any]:
    """Do the run and write its folder; returns what `run.json` holds. A run of the search is scored in one mode."""
    began = time.perf_counter()
    system, folder, searching = SYSTEMS[job.system], job.folder(output), job.candidate is not None
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(job.seed)
    base = SEEING_BASE if system.sees else BASE
    start = base if job.start is None else job.start.folder(output) / "model"
    model, tokenizer = BagelForUnifiedGeneration.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    guidance_scale = settings.get("eval_guidance_scale")
    train_cpu_seconds, chosen_point = 0.0, None
    if system.method != "none":
        few = Scale(scale.generations, VALIDATION_PROMPTS, "validation")
        validation = make_validation(
            system,
            settings,
            folder,
            model,
            lambda: validation_scores(evaluate_in_mode(model, tokenizer, system.modes[0], few, guidance_scale)),
        )
        trainer = make_trainer(system, settings, job.seed, model, tokenizer, folder, validation)
        started = time.process_time()
        trainer.train()
        train_cpu_seconds = time.process_time() - started - validation.cpu_seconds
        chosen_point = validation.chosen

    modes = system.modes[:1] if searching else system.modes
    evaluations = {mode: evaluate_in_mode(model, tokenizer, mode, scale, guidance_scale) for mode in modes}
    shown = evaluations[modes[0]]
    if system.name in TRACED:
        strip(shown).save(folder / "strip.png")
    if is_start(system.name) and not searching:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    result = {
        "system": system.name,
        "title": system.title,
        "group": system.group,
        "seed": job.seed,
        "split": scale.split,
        "settings": settings,
        "start": system.start,
        "rollouts": rollouts(settings),
        "chosen_point": chosen_point,
        "train_cpu_seconds": round(train_cpu_seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "date": str(date.today()),
        "versions": versions(),
        "evaluations": {name: summary(model, found, name != "direct") for name, found in evaluations.items()},
        "diversity": None if searching else vars(group_diversity(model, tokenizer, thinking=modes != ("direct",))),
        "traces": sample_traces(shown),
    }
    replace_file(folder / "run.json", json.dumps(result, separators=(",", ":")) + "\n")
    return result


def end_with_parent() -> None:
    """End this process when its standard input is closed, which the parent's end does, whatever ended it."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_from_arguments() -> None:
    """Run one job of the grid, or of its search, in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("system", choices=SYSTEMS, metavar="system")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--candidate", type=int, help="index of the search's candidate to try")
    parser.add_argument("--rollouts", type=int, default=FULL.generations)
    parser.add_argument("--num-prompts", type=int, default=FULL.num_prompts)
    parser.add_argument("--split", default=FULL.split)
    parser.add_argument("--chosen", type=Path, default=CHOSEN)
    parser.add_argument("--end-with-parent", action="store_true", help="end when standard input is closed")
    args = parser.parse_args()
    if args.end_with_parent:
        end_with_parent()
    quiet()
    scale = Scale(args.rollouts, args.num_prompts, args.split)
    settings = run_settings(SYSTEMS[args.system], load_chosen(args.chosen), scale, args.candidate)
    run_job(Job(args.system, args.seed, args.candidate), args.output, scale, settings)


if __name__ == "__main__":
    run_from_arguments()
