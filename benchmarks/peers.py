"""One step of UniGRPO beside the structures of its peers: the same model, trajectories and machine, taken in turns.

    python benchmarks/peers.py --rounds 3

Four columns, all on this project's layers and in words of its own (peers.md says whose structure each is): "ours", the
trainer; "cached" and "plain" of plain_baseline.py; "packed" of packed_baseline.py. Seconds are those that the CPU
works in one thread, so that a busy machine counts little, and each round runs the columns in the other order. Ratios
are taken within a round. Before them the velocities of all columns are compared at the same states.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from packed_baseline import packed_passes, packed_rollout, packed_trajectory
from phases import PHASES, Phases, watch_trainer
from plain_baseline import PlainRow, plain_flops, plain_passes, plain_rollout
from rich.console import Console
from rich.table import Table

from trl_unigrpo import UniGRPOTrainer
from trl_unigrpo.estimate import Workload, floor_flops
from trl_unigrpo.estimate.hardware import device_name, machine_versions
from trl_unigrpo.models.bagel import BagelConfig
from trl_unigrpo.trainers.dry_run import ragged_lengths, random_trainer
from trl_unigrpo.trajectory import Round, Steps, Trajectory


RESULTS = Path(__file__).parent / "results" / "peers.json"
CPU = torch.device("cpu")
COLUMNS = ("ours", "cached", "packed", "plain")
SHOWN = ("thinking", "denoising", "reference pass", "update")

Seconds = dict[str, float]


def small_config() -> BagelConfig:
    """Make the released architecture at a seventh of its width, with heads in groups as there."""
    vae = {"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4}
    return BagelConfig(
        llm_config={
            "vocab_size": 4096,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
        },
        vae_config={**vae, "scale_factor": 0.3611, "shift_factor": 0.1159},
        max_latent_size=16,
    )


def workload(config: BagelConfig) -> Workload:
    """One group of 8, 10 steps of which 3 stochastic, images of 256 tokens; one pass, full fine-tuning, float32."""
    return Workload(
        config,
        image_size=64,
        prompt_length=32,
        completion_length=128,
        num_generations=8,
        num_inference_steps=10,
        num_iterations=1,
        micro_batch_size=4,
        image_batch_size=8,
        lora_ranks=None,
        half=False,
        gradient_checkpointing=False,
    )


def trajectories_of(rows: Sequence[PlainRow]) -> list[Trajectory]:
    return [Trajectory("", row.prompt, i, [Round(row.thinking, [row.image])]) for i, row in enumerate(rows)]


@torch.no_grad()
def largest_differences(trainer: UniGRPOTrainer, rows: Sequence[PlainRow]) -> Seconds:
    """Compare the velocities of the other structures with the trainer's own, at all trained steps of a rollout."""
    model, found = trainer.unified, {"cached and plain": 0.0, "packed": 0.0}
    for trajectory in trajectories_of(rows):
        [image] = trajectory.rounds[0].images
        states, ids = image.steps, image.context.ids
        each = zip(states.x.split(1), states.t.split(1), strict=True)
        ours = model.packed_forward(ids[None], None, Steps.of([replace(trajectory, row=0)])).velocity
        context = model.encode_context([image.context])
        single = [model.predict_velocity(context, x, t, image.size) for x, t in each]
        _, packed = packed_trajectory(model, ids, states.x, states.t, image.size)
        for name, other in {"cached and plain": torch.cat(single), "packed": packed}.items():
            found[name] = max(found[name], float((other - ours).abs().max()))
    return found


def of_ours(trainer: UniGRPOTrainer) -> dict[str, Seconds]:
    phases = Phases(CPU, clock=time.process_time)
    watch_trainer(trainer, phases)
    with phases("between phases"):
        trainer.train()
    phases.unwatch()
    return {"ours": dict(phases.seconds)}


def of_plain(trainer: UniGRPOTrainer, lengths: Sequence[int]) -> dict[str, Seconds]:
    """Measure both plain columns, which share their rollout."""
    rollout = Phases(CPU, clock=time.process_time)
    rows = plain_rollout(trainer, lengths, rollout)
    columns = {}
    for name, keeps_contexts in {"cached": True, "plain": False}.items():
        passes = Phases(CPU, clock=time.process_time)
        plain_passes(trainer, rows, passes, keeps_contexts)
        columns[name] = {**rollout.seconds, **passes.seconds}
    return columns


def of_packed(trainer: UniGRPOTrainer, lengths: Sequence[int]) -> dict[str, Seconds]:
    phases = Phases(CPU, clock=time.process_time)
    packed_passes(trainer, packed_rollout(trainer, lengths, phases), phases)
    return {"packed": dict(phases.seconds)}


def one_round(load: Workload, backwards: bool) -> dict[str, Seconds]:
    """Measure all columns, each on a trainer of its own over the same random weights."""
    lengths, columns = ragged_lengths(load), {}
    parts: list[Callable[[UniGRPOTrainer], dict[str, Seconds]]] = [
        of_ours,
        lambda trainer: of_plain(trainer, lengths),
        lambda trainer: of_packed(trainer, lengths),
    ]
    for part in reversed(parts) if backwards else parts:
        with tempfile.TemporaryDirectory() as folder:
            columns |= part(random_trainer(load, CPU, folder, lengths))
    return {name: {phase: columns[name].get(phase, 0.0) for phase in PHASES} for name in COLUMNS}


def ratios(rounds: Sequence[dict[str, Seconds]], seconds: Callable[[Seconds], float]) -> dict[str, dict[str, float]]:
    """Compare each other column with ours, round by round."""
    found = {}
    for name in COLUMNS[1:]:
        each = [seconds(columns[name]) / seconds(columns["ours"]) for columns in rounds]
        found[name] = {"median": median(each), "min": min(each), "max": max(each)}
    return found


def summary(load: Workload, rounds: Sequence[dict[str, Seconds]], differences: Seconds) -> dict[str, Any]:
    floor = sum(floor_flops(load).values())
    flops = {name: sum(plain_flops(load, name == "cached").values()) / floor for name in ("cached", "plain")}
    return {
        "date": str(date.today()),
        "hardware": device_name(CPU),
        "versions": machine_versions(),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "thinking_lengths": ragged_lengths(load),
        "largest_differences": differences,
        "median_seconds": {
            name: {phase: median(columns[name][phase] for columns in rounds) for phase in PHASES} for name in COLUMNS
        },
        "ratio": ratios(rounds, lambda column: sum(column.values())),
        "ratio_by_phase": {phase: ratios(rounds, lambda column, p=phase: column[p]) for phase in SHOWN},
        "ratio_model_flops": flops,
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table("CPU seconds", *COLUMNS, title=f"one step on {result['hardware']}, {len(result['rounds'])} rounds")
    for phase in PHASES:
        shown.add_row(phase, *(f"{result['median_seconds'][name][phase]:.2f}" for name in COLUMNS))
    shown.add_section()
    spread = [result["ratio"][name] for name in COLUMNS[1:]]
    shown.add_row("ratio to ours", "1", *(f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for r in spread))
    return shown


def page_rows(result: dict[str, Any]) -> list[str]:
    """Give the rows of the table in peers.md."""
    seconds = [result["median_seconds"][name] for name in COLUMNS]
    rows = [f"| {phase} | " + " | ".join(f"{column[phase]:.1f}" for column in seconds) + " |" for phase in SHOWN]
    each = [result["ratio"][name] for name in COLUMNS[1:]]
    spread = " | ".join(f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for r in each)
    return [*rows, f"| **whole, beside ours** | 1 | {spread} |"]


def main(argv: list[str] | None = None, load: Workload | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of all columns (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="json file (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected at least 1.")
    torch.set_num_threads(1)
    load = load or workload(small_config())
    with tempfile.TemporaryDirectory() as folder:
        trainer = random_trainer(load, CPU, folder, ragged_lengths(load))
        differences = largest_differences(trainer, packed_rollout(trainer, ragged_lengths(load), Phases(CPU)))
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(one_round(load, backwards=number % 2 == 1))
        result = summary(load, rounds, differences)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=max(110, Console().width)).print(table(result))
    print("\nFor the page:\n", *page_rows(result), sep="\n")


if __name__ == "__main__":
    main()
