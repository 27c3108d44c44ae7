"""Seconds, memory and FLOPs of one generation of UniGRPO at BAGEL's real size, random weights, on one GPU.

    python benchmarks/bagel_step.py --only 512-bf16
    python benchmarks/bagel_step.py --only 1024-bf16 --num-generations 8 --plain-trajectories 2
    python benchmarks/bagel_step.py --tiny          the same code at tiny sizes, on a CPU in a minute

One prompt, 24 trajectories, thinkings of 256 to 512 tokens, 25 steps of which 3 stochastic, two optimizer steps, LoRA
of rank 32 on both experts, through UniGRPOTrainer. Beside it two plain baselines (plain_baseline.py), measured on 4
trajectories and scaled to 24: batches of one, one forward per stochastic step with its context encoded again ("plain",
verl-omni's structure) or kept ("plain_cached", UniRL's), and a forward of the reference for each. A small step beside
these and R3's structure, on a CPU: peers.py.

Model FLOPs are the closed form's floor (`trl_unigrpo.estimate`) at the thinkings' mean length; utilisation is held
against a matrix product of the same run. Log-ratios are those of the rollout's velocities against the training
forward's, as a share of the clip range. Every part is written as soon as it is measured; one that fails is written
with its error and its phase, and what comes after it still runs. Exit code 1 if a piece of our own failed.
"""

import argparse
import gc
import json
import math
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from phases import PHASES, Phases, watch_trainer
from plain_baseline import plain_flops, plain_passes, plain_rollout
from rich.console import Console
from step_table import summary, table

from trl_unigrpo import UniGRPOTrainer
from trl_unigrpo.estimate import Workload, estimate_memory, floor_flops, overhead_flops, released_config
from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.estimate.hardware import device_name, machine_versions, matmul_rate
from trl_unigrpo.flow.states import States
from trl_unigrpo.models.bagel import BagelConfig
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.trainers.dry_run import ragged_lengths, random_trainer
from trl_unigrpo.trajectory import Image, Round, Steps, Trajectory


RESULTS = Path(__file__).parent / "results" / "bagel_step.json"
PLAIN_TRAJECTORIES = 4
# Parts of the closed form that make up each phase.
PARTS = {"thinking": ("prefill", "decode"), "denoising": ("contexts", "denoising")}


@dataclass(frozen=True)
class Piece:
    """Sizes of one measurement; thinkings take half of `completion_length` to all of it."""

    image_size: int
    quantization: str | None = None
    prompt_length: int = 32
    completion_length: int = 512
    num_generations: int = 24
    num_inference_steps: int = 25
    lora_rank: int = 32
    micro_batch_size: int = 4
    image_batch_size: int = 8
    gradient_checkpointing: bool = True
    compile_layers: bool = False


PIECES = {
    "512-bf16": Piece(512, micro_batch_size=4),
    "512-nf4": Piece(512, "nf4", micro_batch_size=4),
    "1024-bf16": Piece(1024, micro_batch_size=2, image_batch_size=4),
    "1024-nf4": Piece(1024, "nf4", micro_batch_size=2, image_batch_size=4),
}
TINY = Piece(
    32,
    prompt_length=12,
    completion_length=8,
    num_generations=4,
    num_inference_steps=6,
    lora_rank=2,
    micro_batch_size=2,
)


def tiny_config() -> BagelConfig:
    """Make the released architecture, small in every direction."""
    vae = {"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4}
    return BagelConfig(
        llm_config={
            "vocab_size": 32,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "initializer_range": 0.1,
            "max_position_embeddings": 256,
        },
        vae_config={**vae, "scale_factor": 0.3611, "shift_factor": 0.1159},
        max_latent_size=16,
    )


def workload(config: BagelConfig, piece: Piece, half: bool) -> Workload:
    return Workload(
        config,
        image_size=piece.image_size,
        prompt_length=piece.prompt_length,
        completion_length=piece.completion_length,
        num_generations=piece.num_generations,
        num_inference_steps=piece.num_inference_steps,
        micro_batch_size=piece.micro_batch_size,
        image_batch_size=piece.image_batch_size,
        lora_ranks=(piece.lora_rank, piece.lora_rank),
        quantization=piece.quantization,
        half=half,
        gradient_checkpointing=piece.gradient_checkpointing,
    )


def at_mean_length(load: Workload) -> Workload:
    """The workload whose FLOPs are those of lengths that differ: they are nearly linear in the length."""
    lengths = ragged_lengths(load)
    return replace(load, completion_length=round(sum(lengths) / len(lengths)))


def middle_lengths(lengths: list[int], count: int) -> list[int]:
    """Take so many of the lengths, from the middles of equal shares of them, so that the mean stays."""
    return [sorted(lengths)[(2 * i + 1) * len(lengths) // (2 * count)] for i in range(count)]


class Measurement:
    """
    One piece on its device: our generation, then the plain baselines.

    Args:
        piece: its sizes.
        config: the model's.
        device: that it runs on.
        count: whether FLOPs are counted, too; that takes time.
        save: called with the entry of the results whenever it has grown.
    """

    def __init__(
        self, piece: Piece, config: BagelConfig, device: torch.device, count: bool, save: Callable[[dict], None]
    ):
        self.piece, self.device, self.count, self.save = piece, device, count, save
        self.load = workload(config, piece, half=device.type == "cuda")
        self.lengths = ragged_lengths(self.load)
        mean = sum(self.lengths) / len(self.lengths)
        self.entry: dict[str, Any] = {
            "piece": vars(piece),
            "thinking_lengths": {"min": min(self.lengths), "mean": mean, "max": max(self.lengths)},
            **about_run(device),
        }

    def run(self, plain_trajectories: int) -> None:
        """Measure our own and, unless none of their trajectories are wanted, the baselines."""
        phases = Phases(self.device)
        with tempfile.TemporaryDirectory() as folder:
            try:
                trainer = self._ours(folder, phases)
            except RuntimeError as error:  # out of memory, and what else a device may say
                self.entry |= failure(error, phases)
                trainer = None
            self.save(self.entry)
            if trainer is not None and plain_trajectories:
                self._baselines(trainer, middle_lengths(self.lengths, min(plain_trajectories, len(self.lengths))))

    def _counted(self, phases: Phases) -> AbstractContextManager:
        return phases.counted_by(count_flops()) if self.count else nullcontext()

    def _ours(self, folder: str, phases: Phases) -> UniGRPOTrainer:
        rate = matmul_rate(self.device, 8192 if self.device.type == "cuda" else 256)
        with phases("loading"):
            trainer = random_trainer(self.load, self.device, folder, self.lengths)
        if self.piece.compile_layers:
            with phases("compiling"):
                compile_layers(trainer, self.load)
        shares = watch_trainer(trainer, phases)
        with self._counted(phases), phases("between phases"):
            trainer.train()
        phases.unwatch()
        self.entry |= our_result(self.load, self.lengths, phases, rate, self.count)
        self.entry["log_ratio_share"] = log_ratio_summary(self.load, torch.cat(shares).double())
        return trainer

    def _baselines(self, trainer: UniGRPOTrainer, lengths: list[int]) -> None:
        rollout, rows = Phases(self.device), None
        for name, keeps_contexts in {"plain": False, "plain_cached": True}.items():
            free_memory(self.device)
            phases = Phases(self.device)
            try:
                if rows is None:
                    with self._counted(rollout):
                        rows = plain_rollout(trainer, lengths, rollout)
                with self._counted(phases):
                    plain_passes(trainer, rows, phases, keeps_contexts)
                flops = plain_flops(at_mean_length(self.load), keeps_contexts)
                self.entry[name] = plain_result(self.entry, flops, lengths, rollout, phases)
            except RuntimeError as error:
                self.entry[name] = failure(error, phases if rows else rollout)
            self.save(self.entry)


def compile_layers(trainer: UniGRPOTrainer, load: Workload) -> None:
    """Compile what the run will call: both experts, with and without gradients and adapters, for any size."""
    base, side = trainer.unified, load.config.pixels_per_token * 4
    base.compile_layers()
    rows = [ContextRow(torch.full((length,), 7)) for length in (9, 12)]
    ids = torch.full((2, 12), 7, device=base.device)
    latents = torch.zeros(2, 2, *base.latent_shape((side, side)), device=base.device)
    images = [
        Image(x[0], (side, side), row, States(x, torch.tensor([0.3, 0.6])))
        for x, row in zip(latents, rows, strict=True)
    ]
    steps = Steps.of([Trajectory("", [], number, [Round([], [image])]) for number, image in enumerate(images)])
    with trainer.accelerator.autocast():
        with torch.no_grad():
            times = torch.full((2,), 0.5, device=base.device)
            base.predict_velocity(base.encode_context(rows), latents[:, 0], times, (side, side))
            with base.reference() as reference:
                reference.packed_forward(ids, None, steps)
        output = base.packed_forward(ids, None, steps)
    (output.velocity.sum() + output.last_hidden_state.float().sum()).backward()
    trainer.model.zero_grad()


def about_run(device: torch.device) -> dict[str, Any]:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "date": str(date.today()),
        "hardware": device_name(device),
        "gpu_memory_bytes": memory,
        "versions": machine_versions(),
        "command": shlex.join(["python", *sys.argv]),
    }


def failure(error: RuntimeError, phases: Phases) -> dict[str, Any]:
    """Say what failed, and in which phase."""
    traceback.print_exception(error)
    traceback.clear_frames(error.__traceback__)  # they hold the tensors
    return {"error": f"{type(error).__name__}: {error}", "phase": phases.failed}


def free_memory(device: torch.device) -> None:
    """Give the device back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def our_result(load: Workload, lengths: list[int], phases: Phases, rate: float, count: bool) -> dict[str, Any]:
    counted_load, memory = at_mean_length(load), estimate_memory(load)
    floor, overhead = floor_flops(counted_load), overhead_flops(counted_load)
    model_flops = {phase: sum(floor.get(part, 0) for part in PARTS.get(phase, (phase,))) for phase in PHASES}
    model_flops["old log-probs"] = overhead["old log-probs"]
    seconds = sum(phases.seconds[phase] for phase in PHASES)
    return {
        "matmul_flops_per_second": rate,
        "phases": {
            phase: {
                "seconds": phases.seconds[phase],
                "model_flops": model_flops[phase],
                "utilisation": model_flops[phase] / rate / phases.seconds[phase],
                "counted_flops": phases.counted[phase] if count else None,
                "peak_bytes": phases.peak.get(phase),
                "estimated_peak_bytes": memory.peaks.get(phase),
            }
            for phase in PHASES
        },
        "seconds": seconds,
        "seconds_compiling": phases.seconds["compiling"],
        "seconds_of_first_calls": phases.excess_of_first_calls(),
        "peak_bytes": max(phases.peak.values(), default=None),
        "estimated_peak_bytes": memory.peak,
        "floor_flops": sum(floor.values()),
        "floor_ratio": seconds * rate / sum(floor.values()),
        "thinking_tokens_per_second": sum(lengths) / phases.seconds["thinking"],
        "image_steps_per_second": load.trajectories * load.num_inference_steps / phases.seconds["denoising"],
        "overhead_flops": overhead,
        "counted_flops": sum(phases.counted.values()) if count else None,
        "memory_parts": memory.parts,
    }


def log_ratio_summary(load: Workload, share: torch.Tensor) -> dict[str, Any]:
    return {
        "numbers": load.latents * load.config.latent_channels,
        "rms": float(share.square().mean().sqrt()),
        "max": float(share.abs().max()),
    }


def plain_result(
    ours: dict[str, Any], flops: dict[str, int], lengths: list[int], rollout: Phases, passes: Phases
) -> dict[str, Any]:
    """Scale what a baseline's trajectories took to the number of ours; an optimizer step takes what it takes."""
    times = ours["piece"]["num_generations"] / len(lengths)
    seconds, counted = ({**getattr(rollout, kind), **getattr(passes, kind)} for kind in ("seconds", "counted"))
    scaled = {phase: value * (1 if phase == "optimizer" else times) for phase, value in seconds.items()}
    ours_flops = sum(found["model_flops"] for found in ours["phases"].values())
    return {
        "trajectories_measured": len(lengths),
        "thinking_lengths": lengths,
        "seconds_scaled": scaled,
        "counted_flops_scaled": {p: n * times for p, n in counted.items()} if any(counted.values()) else None,
        "peak_bytes": max((*rollout.peak.values(), *passes.peak.values()), default=None),
        "model_flops": flops,
        "ratio_seconds": sum(scaled.values()) / ours["seconds"],
        "ratio_model_flops": sum(flops.values()) / ours_flops,
    }


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        choices=list(PIECES),
        action="append",
        help="a piece to run; may be given several times (default: all)",
    )
    parser.add_argument("--tiny", action="store_true", help="one piece of tiny sizes instead, its FLOPs counted")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one; cpu runs --tiny alone"
    )
    parser.add_argument(
        "--num-generations", type=int, metavar="N", help=f"trajectories (default: {Piece(16).num_generations}, tiny 4)"
    )
    parser.add_argument(
        "--completion-length",
        type=int,
        metavar="N",
        help=f"most tokens of a thinking; the least are half as many (default: {Piece(16).completion_length}, tiny 8)",
    )
    parser.add_argument(
        "--plain-trajectories",
        type=int,
        metavar="N",
        default=PLAIN_TRAJECTORIES,
        help="trajectories of the plain baselines, scaled to all of them (default: %(default)s)",
    )
    parser.add_argument("--compile-layers", action="store_true", help="with compile_layers=True, compiled beforehand")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain baselines")
    parser.add_argument("--results", type=Path, help=f"json file; pieces measured before stay (default: {RESULTS})")
    arguments = parser.parse_args(argv)
    for name in ("num_generations", "completion_length", "plain_trajectories"):
        value, least = getattr(arguments, name), 1 if name == "plain_trajectories" else 2
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}.")
    return parser, arguments


def resized(piece: Piece, arguments: argparse.Namespace) -> Piece:
    """The piece at the sizes asked for; micro-batches shrink until they divide the group."""
    group = arguments.num_generations or piece.num_generations
    return replace(
        piece,
        num_generations=group,
        micro_batch_size=math.gcd(piece.micro_batch_size, group),
        completion_length=arguments.completion_length or piece.completion_length,
        compile_layers=arguments.compile_layers,
    )


def main(argv: list[str] | None = None) -> int:
    parser, arguments = parse(argv)
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU found.")
    if kind == "cpu" and not arguments.tiny:
        message = "no GPU used. The real sizes need one; --tiny runs the same code at tiny sizes on a CPU."
        if arguments.only or arguments.device:
            parser.error(message)
        Console().print(f"Nothing measured: {message}")  # among all benchmarks, on a machine without one
        return 0
    pieces = {"tiny": TINY} if arguments.tiny else {name: PIECES[name] for name in arguments.only or PIECES}
    written = run_pieces(
        {name: resized(piece, arguments) for name, piece in pieces.items()},
        tiny_config() if arguments.tiny else released_config(),
        torch.device(kind),
        file=arguments.results or (None if arguments.tiny else RESULTS),
        count=arguments.tiny,
        plain_trajectories=0 if arguments.no_plain else arguments.plain_trajectories,
    )
    return int(any("error" in written[name] for name in pieces))


def run_pieces(
    pieces: dict[str, Piece],
    config: BagelConfig,
    device: torch.device,
    file: Path | None,
    count: bool,
    plain_trajectories: int,
) -> dict[str, Any]:
    """Measure and show the pieces one after the other; returns them, and what the file had before."""
    written = json.loads(file.read_text()) if file is not None and file.exists() else {}

    def save(name: str, entry: dict) -> None:
        written[name] = entry
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(written, indent=2) + "\n")

    for name, piece in pieces.items():
        Measurement(piece, deepcopy(config), device, count, partial(save, name)).run(plain_trajectories)
        show(name, written[name])
        free_memory(device)
    return written


def show(name: str, result: dict) -> None:
    if "error" not in result:
        Console(width=max(110, Console().width)).print(table(result, f"{name} on {result['hardware']}"))
    print("\n".join(summary(name, result)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
