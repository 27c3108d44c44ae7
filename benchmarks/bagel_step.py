"""Seconds, memory and FLOPs of one generation of UniGRPO at BAGEL's real size, random weights, on one GPU.

    python benchmarks/bagel_step.py --only 512-bf16
    python benchmarks/bagel_step.py --tiny          the same code at tiny sizes, on a CPU in seconds

One prompt, 24 trajectories, 512 thinking tokens each, 25 steps of which 3 stochastic, two optimizer steps, LoRA of
rank 32 on both experts, through UniGRPOTrainer. Beside it a plain baseline, measured on 4 trajectories and scaled to
24: batches of one, one forward per stochastic step with its context encoded again, and a forward of the reference for
each. Its rollout encodes each context once, and keeps a cache while it thinks, as anybody's would.

Model FLOPs are the closed form's floor (`trl_unigrpo.estimate`); utilisation is held against a matrix product of the
same run. Log-ratios are those of the rollout's velocities against the training forward's, as a share of the clip
range.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from trl_unigrpo import UniGRPOTrainer
from trl_unigrpo.estimate import (
    Workload,
    estimate_memory,
    floor_flops,
    overhead_flops,
    released_config,
)
from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.estimate.flops import (
    image_forward,
    logits_forward,
    packed_forward,
    text_forward,
)
from trl_unigrpo.estimate.hardware import (
    device_name,
    machine_versions,
    matmul_rate,
    synchronize,
)
from trl_unigrpo.flow import (
    clipped_surrogate,
    flow_timesteps,
    log_ratio,
    velocity_mse,
)
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.flow.states import SDESteps, rows_of
from trl_unigrpo.models.bagel import BagelConfig
from trl_unigrpo.monitoring.events import ImageLoss, Watcher
from trl_unigrpo.sampling import decode, paint
from trl_unigrpo.seeding import TRAIN, row_generator
from trl_unigrpo.trainers.dry_run import random_trainer
from trl_unigrpo.trainers.windows import draw_windows
from trl_unigrpo.trajectory import Image, Round, Trajectory


RESULTS = Path(__file__).parent / "results" / "bagel_step.json"
PLAIN_TRAJECTORIES = 4
PHASES = ("thinking", "denoising", "VAE decode", "old log-probs", "reference pass", "update", "optimizer")
# Parts of the closed form that make up each phase.
PARTS = {"thinking": ("prefill", "decode"), "denoising": ("contexts", "denoising")}


@dataclass(frozen=True)
class Piece:
    """Sizes of one measurement."""

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


class Phases:
    """
    Seconds, peak memory and counted FLOPs by phase. A phase that begins inside another one interrupts it.

    Args:
        device: of the model; waited for at every change of phase.
        flops: tells the FLOPs so far; None if they aren't counted.
    """

    def __init__(self, device: torch.device, flops: Callable[[], int] | None = None):
        self.device, self.flops = device, flops
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self.counted: dict[str, int] = defaultdict(int)
        self._stack: list[str] = []
        self._since, self._before = 0.0, 0

    def _switch(self) -> None:
        synchronize(self.device)
        now, flops = time.perf_counter(), self.flops() if self.flops else 0
        if self._stack:
            name = self._stack[-1]
            self.seconds[name] += now - self._since
            self.counted[name] += flops - self._before
            if self.device.type == "cuda":
                self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated(self.device))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since, self._before = time.perf_counter(), flops

    def enter(self, name: str) -> None:
        self._switch()
        self._stack.append(name)

    def leave(self) -> None:
        self._switch()
        self._stack.pop()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def watch(self, owner: Any, method: str, name: str, when: Callable[[], bool] = lambda: True) -> None:
        """Make every call of a method a phase, if `when` says so at the time."""
        original = getattr(owner, method)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self(name) if when() else nullcontext():
                return original(*args, **kwargs)

        setattr(owner, method, watched)


class OptimizerPhase(TrainerCallback):
    def __init__(self, phases: Phases):
        self.phases = phases

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.phases.enter("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.phases.leave()


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


def watch_trainer(trainer: UniGRPOTrainer, phases: Phases) -> list[torch.Tensor]:
    """Tell the phases of a trainer apart; returns the list that the first pass's log-ratios are added to."""
    no_grad = lambda: not torch.is_grad_enabled()  # noqa: E731
    phases.watch(trainer, "training_step", "update")
    phases.watch(trainer, "_prepare_inputs", "rewards and data")
    phases.watch(trainer, "_generate_single_turn", "thinking")
    phases.watch(trainer, "_paint", "denoising")
    phases.watch(trainer.unified, "decode_latents", "VAE decode")
    phases.watch(trainer, "_velocities", "reference pass")
    phases.watch(trainer, "_get_per_token_logps_and_entropies", "old log-probs", when=no_grad)
    trainer.add_callback(OptimizerPhase(phases))
    ratios = LogRatios()
    trainer.add_callback(ratios)
    return ratios.shares


class LogRatios(Watcher):
    """Collects what [`log_ratio_shares`] says of the first pass over each micro-batch."""

    def __init__(self) -> None:
        self.shares: list[torch.Tensor] = []

    def on_image_loss(self, args: Any, state: Any, control: Any, image_loss: ImageLoss, **kwargs: Any) -> None:
        if image_loss.first_pass:
            self.shares.append(log_ratio_shares(image_loss.velocity, image_loss.states, image_loss.objective))


def log_ratio_shares(velocity: torch.Tensor, states: SDESteps, objective: Any) -> torch.Tensor:
    """(S,) log-ratios of a training forward's velocities against the rollout's, over the clip range."""
    sampled, transition = states.velocity.to(velocity), objective.transition(states)
    ratio = log_ratio(states.x, states.x_next, velocity, sampled, transition, objective.args.ratio_norm)
    return (ratio / objective.epsilon).cpu()


def plain_generation(trainer: UniGRPOTrainer, trajectories: int, phases: Phases) -> None:
    """Run the plain baseline's generation and passes, with the trainer's model and settings."""
    args, base, device = trainer.args, trainer.unified, trainer.accelerator.device
    size = (args.image_size, args.image_size)
    prompt = trainer.train_dataset[0]["prompt"]
    prompt_ids = trainer._tokenize_prompts([prompt])[0][0]
    ids = torch.tensor([prompt_ids], device=device)
    base.train()
    nodes = flow_timesteps(args.num_inference_steps, args.timestep_shift)
    rows: list[tuple[list[int], Image]] = []
    for i in range(trajectories):
        with torch.no_grad(), trainer.accelerator.autocast():
            with phases("thinking"):
                sampled = base.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=trainer.generation_config
                )
            thinking = sampled[0, ids.shape[1] :].tolist()
            plan = RolloutPlan(nodes, size, draw_windows(args, trainer.generation, 0, 1))
            trajectory = Trajectory(prompt, prompt_ids, i, [Round(thinking)])
            with phases("denoising"):
                [image] = paint(base, [trajectory], plan, [row_generator(args.seed, TRAIN, 0, i)])
            with phases("VAE decode"):
                decode(base, [image])
        rows.append((thinking, image))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=args.adam_epsilon)
    old: dict[tuple[int, int], torch.Tensor] = {}
    for _ in range(args.num_iterations):
        for i, (thinking, image) in enumerate(rows):
            advantage = torch.tensor(1.0 if i % 2 else -1.0, device=device)
            with phases("update"):
                plain_text_step(trainer, prompt_ids, thinking, advantage)
            for k in range(len(image.steps)):
                plain_flow_step(trainer, image, k, advantage, old.setdefault, (i, k), phases)
        with phases("optimizer"):
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()


def plain_text_step(trainer: UniGRPOTrainer, prompt: list[int], thinking: list[int], advantage: torch.Tensor) -> None:
    """Compute log-probs of a thinking from whole logits, and their backward pass."""
    ids = torch.tensor([prompt + thinking], device=advantage.device)
    with trainer.accelerator.autocast():
        logits = trainer.unified(input_ids=ids, logits_to_keep=len(thinking) + 1).logits[:, :-1]
    log_probs = logits.float().log_softmax(-1).gather(-1, ids[:, -len(thinking) :, None])
    (-advantage * (log_probs - log_probs.detach()).exp().mean()).backward()


def plain_flow_step(
    trainer: UniGRPOTrainer,
    image: Image,
    k: int,
    advantage: torch.Tensor,
    keep: Callable[[Any, torch.Tensor], torch.Tensor],
    key: tuple[int, int],
    phases: Phases,
) -> None:
    """One stochastic step: a forward of the reference, one of the policy, its backward pass."""
    base, objective = trainer.unified, trainer._setup.objective
    states = rows_of(image.steps, slice(k, k + 1))

    def velocity(model: Any) -> torch.Tensor:
        with trainer.accelerator.autocast():
            with torch.no_grad():
                context = model.encode_context([image.context])
            return model.predict_velocity(context, states.x, states.t.to(states.x.device), image.size)

    with phases("reference pass"), base.reference() as reference, torch.no_grad():
        anchor = velocity(reference)
    with phases("update"):
        predicted = velocity(base)
        old, transition = keep(key, predicted.detach()), objective.transition(states)
        ratio = log_ratio(states.x, states.x_next, predicted, old, transition, trainer.args.ratio_norm)
        loss = clipped_surrogate(ratio, advantage, objective.epsilon).mean()
        regularizer = velocity_mse(predicted, anchor, num_batch_dims=1).mean()
        (loss + trainer._setup.regularizer_weight * regularizer).backward()


def plain_flops(load: Workload) -> dict[str, int]:
    """Count the plain baseline's FLOPs by phase in closed form, without adapters."""
    single = replace(load, sde_window_size=1)
    parts, text = floor_flops(single), replace(load, num_prompts=load.trajectories, num_generations=1)
    words = load.completion_length * logits_forward(load)
    again = int(load.gradient_checkpointing)
    image, context = image_forward(load), text_forward(load, load.context)
    backward = image.linear * (2 + again) + image.attention * 7 // 2 + image.attention * again
    backward += image.entry + 2 * image.exit
    steps = load.num_iterations * load.trajectories * load.sde_window_size
    text_update = context.linear * (2 + again) + context.attention * 7 // 2 + context.attention * again + 2 * words
    return {
        "thinking": floor_flops(text)["prefill"] + parts["decode"],
        "denoising": parts["contexts"] + parts["denoising"],
        "VAE decode": parts["VAE decode"],
        "reference pass": steps * packed_forward(single).total,
        "update": load.num_iterations * load.trajectories * text_update + steps * (context.total + backward),
    }


def measure(name: str, piece: Piece, config: BagelConfig, device: torch.device, count: bool, plain: bool) -> dict:
    """Measure one piece: the trainer's generation with its two optimizer steps, then the plain baseline."""
    load = workload(config, piece, half=device.type == "cuda")
    rate = matmul_rate(device, 8192 if device.type == "cuda" else 256)
    with tempfile.TemporaryDirectory() as folder, count_flops() if count else nullcontext() as counter:
        flops = counter.get_total_flops if counter is not None else None
        trainer = random_trainer(load, device, folder)
        ours = Phases(device, flops)
        shares = watch_trainer(trainer, ours)
        trainer.train()
        theirs = Phases(device, flops)
        if plain:
            trainer.unified.decode_latents = type(trainer.unified).decode_latents.__get__(trainer.unified)
            plain_generation(trainer, PLAIN_TRAJECTORIES, theirs)
    floor, overhead, memory = floor_flops(load), overhead_flops(load), estimate_memory(load)
    model_flops = {phase: sum(floor.get(part, 0) for part in PARTS.get(phase, (phase,))) for phase in PHASES}
    model_flops["old log-probs"] = overhead["old log-probs"]
    share = torch.cat(shares).double()
    result = {
        "piece": vars(piece),
        "matmul_flops_per_second": rate,
        "phases": {
            phase: {
                "seconds": ours.seconds[phase],
                "model_flops": model_flops[phase],
                "utilisation": model_flops[phase] / rate / ours.seconds[phase],
                "counted_flops": ours.counted[phase] if count else None,
                "peak_bytes": ours.peak.get(phase),
                "estimated_peak_bytes": memory.peaks.get(phase),
            }
            for phase in PHASES
        },
        "seconds": sum(ours.seconds[phase] for phase in PHASES),
        "floor_flops": sum(floor.values()),
        "overhead_flops": overhead,
        "counted_flops": sum(ours.counted.values()) if count else None,
        "log_ratio_share": {
            "numbers": load.latents * config.latent_channels,
            "rms": float(share.square().mean().sqrt()),
            "max": float(share.abs().max()),
        },
        "memory_parts": memory.parts,
    }
    if plain:
        times = load.trajectories / PLAIN_TRAJECTORIES
        scaled = {phase: s * (1 if phase == "optimizer" else times) for phase, s in theirs.seconds.items()}
        result["plain"] = {
            "trajectories_measured": PLAIN_TRAJECTORIES,
            "seconds_scaled": scaled,
            "counted_flops_scaled": {p: n * times for p, n in theirs.counted.items()} if count else None,
            "model_flops": plain_flops(load),
            "ratio_seconds": sum(scaled.values()) / result["seconds"],
            "ratio_model_flops": sum(plain_flops(load).values()) / sum(model_flops.values()),
        }
    return result


def table(name: str, result: dict, title: str) -> Table:
    rows = Table(
        *("phase", "seconds", "model PFLOP", "utilisation", "peak GiB", "estimated GiB", "plain, seconds"), title=title
    )
    plain = result.get("plain", {}).get("seconds_scaled", {})

    def gibibytes(value: int | None) -> str:
        return f"{value / 2**30:.1f}" if value else "-"

    for phase, found in result["phases"].items():
        rows.add_row(
            phase,
            f"{found['seconds']:.2f}",
            f"{found['model_flops'] / 1e15:.3g}",
            f"{found['utilisation']:.1%}" if found["model_flops"] else "-",
            gibibytes(found["peak_bytes"]),
            gibibytes(found["estimated_peak_bytes"]),
            f"{plain[phase]:.2f}" if phase in plain else "-",
        )
    rows.add_section()
    total = result["floor_flops"] / result["matmul_flops_per_second"] / result["seconds"]
    rows.add_row(
        "all", f"{result['seconds']:.2f}", f"{result['floor_flops'] / 1e15:.3g}", f"{total:.1%}", "", "",
        f"{sum(plain.values()):.2f}" if plain else "-",
    )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PIECES), action="append", help="pieces to run; default: all")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU, FLOPs counted")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain baseline")
    parser.add_argument("--results", type=Path, help=f"json file; pieces measured before stay (default: {RESULTS})")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        message = "no GPU found. The real sizes need one; --tiny runs the same code at tiny sizes on a CPU."
        if arguments.only:
            parser.error(message)
        Console().print(f"Nothing measured: {message}")  # among all benchmarks, on a machine without one
        return {}
    device = torch.device("cpu" if arguments.tiny else "cuda")
    pieces = {"tiny": TINY} if arguments.tiny else {name: PIECES[name] for name in arguments.only or PIECES}
    file = arguments.results or (None if arguments.tiny else RESULTS)
    written = json.loads(file.read_text()) if file is not None and file.exists() else {}
    tables = []
    for name, piece in pieces.items():
        config = tiny_config() if arguments.tiny else released_config()
        result = measure(name, piece, config, device, count=arguments.tiny, plain=not arguments.no_plain)
        result["date"], result["hardware"] = str(date.today()), device_name(device)
        result["versions"] = machine_versions()
        result["command"] = shlex.join(["python", *sys.argv])
        written[name] = result
        tables.append(table(name, result, f"{name} on {result['hardware']}"))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(written, indent=2) + "\n")
    for rows, name in zip(tables, pieces, strict=True):
        console, share = Console(), written[name]["log_ratio_share"]
        console.print(rows)
        console.print(
            f"{name}: rollout against training, log-ratio over the clip range at {share['numbers']} numbers: "
            f"rms {share['rms']:.2g}, max {share['max']:.2g}"
        )
        if "plain" in written[name]:
            plain = written[name]["plain"]
            console.print(
                f"{name}: plain baseline, {plain['trajectories_measured']} trajectories scaled, over ours: "
                f"{plain['ratio_seconds']:.2f} in seconds, {plain['ratio_model_flops']:.2f} in FLOPs"
            )
    return written


if __name__ == "__main__":
    main()
