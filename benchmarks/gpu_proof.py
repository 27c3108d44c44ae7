"""Prove on one GPU what a CPU can't: that the real sizes run there, how fast, and in how much memory.

    python benchmarks/gpu_proof.py                                all stages that fit, the most telling first
    python benchmarks/gpu_proof.py --stage 512-bf16 --stage 512-nf4  some of them
    python benchmarks/gpu_proof.py --budget 480                   none that would not be done after 480 seconds
    python benchmarks/gpu_proof.py --rehearse                     the same stages at tiny sizes, on a CPU

Nothing is downloaded: weights are random. Each stage is a process of its own, whose line is added to the results as it
ends, so a crash or a lack of time costs the stage alone. Without a GPU, the plan is shown.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results" / "gpu_proof.jsonl"
REFERENCE_RATE = 790e12
"""FLOP/s of the H100's matrix products, whose seconds the stages name."""
HEADROOM = 1.5  # GiB of the CUDA context and of what the allocator can't use again


@dataclass(frozen=True)
class Stage:
    """
    One measurement.

    Attributes:
        about: what it shows.
        seconds: that it takes on an H100.
        command, rehearsal: arguments of Python for the real and for tiny sizes. `{results}` stands for the file that
            it writes, `{folder}` for a folder that is removed afterwards.
        told: what its result says in a few words.
        piece: the piece of bagel_step.py whose memory the estimator knows.
    """

    about: str
    seconds: int
    command: str
    rehearsal: str
    told: Callable[[dict[str, Any]], str] = field(default=lambda result: "")
    piece: str | None = None


def told_machine(result: dict[str, Any]) -> str:
    return f"{result['device']}, {result['gib']:.0f} GiB, {result['matmul_tflops']:.0f} TFLOP/s in bf16"


def told_piece(result: dict[str, Any]) -> str:
    """Say seconds, peak and ratios of a piece of bagel_step.py."""
    [piece] = result.values()
    if "error" in piece:
        return f"{piece['error']} in phase {piece['phase']!r}"
    words = [f"{piece['seconds']:.1f} s, {piece['floor_ratio']:.2f}x the floor"]
    words += [f"peak {piece['peak_bytes'] / 2**30:.1f} GiB"] if piece["peak_bytes"] else []
    for name, against in (("plain", "the plain structure"), ("plain_cached", "the plain structure with its cache")):
        ratio = piece.get(name, {}).get("ratio_seconds")
        words += [f"{ratio:.2f}x faster than {against}"] if ratio else []
    return "; ".join(words)


def told_painter(result: dict[str, Any]) -> str:
    own, theirs = (result[f"seconds_per_image_step_{which}"] for which in ("rollout", "pipeline"))
    return f"{own * 1000:.1f} ms for an image-step, {own / theirs:.2f}x the pipeline's own"


STEP = "benchmarks/bagel_step.py --results {results}"
TINY = f"{STEP} --tiny --device cpu"
SHAPEWORLD = "examples/unigrpo_shapeworld.py --output_dir {folder} --trust_checks raise --disable_tqdm true"
STAGES = {
    "machine": Stage(
        "versions, memory, rates", 25, "benchmarks/gpu_proof.py --describe {results}",
        "benchmarks/gpu_proof.py --describe {results} --rehearse", told_machine,
    ),
    "checks": Stage(
        "tiny models on the GPU give the official outputs, gradients and images, and resume", 35,
        "-m pytest -q -p no:cacheprovider tests/models/test_gpu.py",
        "-m pytest -q -p no:cacheprovider tests/models/test_gpu.py",
    ),
    "512-bf16": Stage(
        "BAGEL 7B at 512 pixels, LoRA, 24 trajectories: one generation, two updates; two plain baselines", 130,
        f"{STEP} --only 512-bf16 --plain-trajectories 2", TINY, told_piece, "512-bf16",
    ),
    "512-nf4": Stage(
        "the same in 4 bits", 110, f"{STEP} --only 512-nf4 --no-plain", f"{TINY} --no-plain", told_piece, "512-nf4",
    ),
    "1024-bf16": Stage(
        "1024 pixels, 8 trajectories", 100, f"{STEP} --only 1024-bf16 --num-generations 8 --no-plain",
        f"{TINY} --no-plain --num-generations 2", told_piece, "1024-bf16",
    ),
    "painter": Stage(
        "a painter of Stable Diffusion 3.5 medium's size with LoRA, beside its pipeline's own loop", 50,
        "benchmarks/pipeline_step.py --size medium --device cuda --repeats 3 --results {results}",
        "benchmarks/pipeline_step.py --repeats 1 --batch 2 --num-inference-steps 4 --results {results}", told_painter,
    ),
    "shapeworld": Stage(
        "five rollouts of the built-in world in bf16, every start-up check on", 60,
        f"{SHAPEWORLD} --max_steps 10 --bf16 true", f"{SHAPEWORLD} --max_steps 2 --use_cpu true",
    ),
    "512-compiled": Stage(
        "512 pixels again, layers compiled", 120, f"{STEP} --only 512-bf16 --no-plain --compile-layers",
        f"{TINY} --no-plain --compile-layers", told_piece, "512-bf16",
    ),
    "1024-bf16-all": Stage(
        "1024 pixels, 24 trajectories", 230, f"{STEP} --only 1024-bf16 --no-plain",
        f"{TINY} --no-plain", told_piece, "1024-bf16",
    ),
}  # fmt: skip


def describe(file: Path, rehearse: bool) -> None:
    """Write what the plan depends on: the device, its rates, and the memory that each piece needs by estimate."""
    import bagel_step
    import torch

    from trl_unigrpo.estimate import estimate_memory
    from trl_unigrpo.estimate.hardware import copy_rate, device_name, machine_versions, matmul_rate

    device = torch.device("cpu" if rehearse else "cuda")
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    size = 256 if rehearse else 8192
    config = bagel_step.released_config()
    needs = {
        name: estimate_memory(bagel_step.workload(config, piece, half=True)).peak / 2**30
        for name, piece in bagel_step.PIECES.items()
    }
    found = {
        "device": device_name(device),
        "gib": total / 2**30,
        "matmul_tflops": matmul_rate(device, size) / 1e12,
        "copy_tb_per_second": copy_rate(device, 2**20 if rehearse else 2**28) / 1e12,
        "versions": machine_versions(),
        "estimated_gib": needs,
    }
    file.write_text(json.dumps(found))


def environment() -> dict[str, str]:
    """Say where the stages find the package, and how they allocate."""
    paths = [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    own = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**own, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TOKENIZERS_PARALLELISM": "false"}


def run(stage: Stage, rehearse: bool, seconds: float | None) -> dict[str, Any]:
    """Run a stage, for so many seconds at most: how it ended, what it measured, its last words."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = stage.rehearsal if rehearse else stage.command
        words = words.replace("{results}", str(file)).replace("{folder}", str(Path(folder) / "run"))
        command, log = [sys.executable, *shlex.split(words)], Path(folder) / "log.txt"
        started = time.perf_counter()
        with log.open("w") as out:
            try:
                code = subprocess.run(
                    command, cwd=BENCHMARKS.parent, env=environment(), stdout=out, stderr=out, timeout=seconds
                ).returncode
                status = "passed" if code == 0 else f"failed with {code}"
            except subprocess.TimeoutExpired:
                status = "out of time"
        return {
            "status": status,
            "seconds": round(time.perf_counter() - started, 1),
            "command": shlex.join(["python", *shlex.split(words)]).replace(folder, "..."),
            "result": json.loads(file.read_text()) if file.exists() else None,
            "log": log.read_text(errors="replace")[-20_000:],
        }


def reason_to_skip(stage: Stage, machine: dict[str, Any], seconds: float | None, rehearse: bool) -> str | None:
    """Say why a stage is not begun, if it isn't: too little memory or too little time."""
    if rehearse:
        return None
    needed = machine["estimated_gib"].get(stage.piece, 0) + HEADROOM
    if needed > machine["gib"]:
        return f"needs {needed:.1f} GiB by estimate, and this GPU has {machine['gib']:.1f}"
    expected = expected_seconds(stage, machine)
    if seconds is not None and expected > seconds:
        return f"takes about {expected:.0f} s, and {seconds:.0f} s are left"
    return None


def expected_seconds(stage: Stage, machine: dict[str, Any]) -> float:
    return stage.seconds * max(1.0, REFERENCE_RATE / 1e12 / machine["matmul_tflops"])


def prove(names: list[str], rehearse: bool, budget: float | None, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run stages in order, each one's line written and yielded as it ends. The machine is always described first."""
    began, machine = time.perf_counter(), {}
    for name in ["machine", *(name for name in names if name != "machine")]:
        stage, left = STAGES[name], None if budget is None else budget - (time.perf_counter() - began)
        skipped = machine and reason_to_skip(stage, machine, left, rehearse)
        line = {"status": "skipped", "seconds": 0.0, "log": skipped} if skipped else run(stage, rehearse, left)
        if name == "machine":
            machine = line["result"] or {}
        line = {"stage": name, "date": str(date.today()), "hardware": machine.get("device"), **line}
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        yield name, line
        if not machine:
            return


def plan() -> Table:
    table = Table("stage", "what it shows", "seconds on an H100", title="No GPU found. With one, this would run:")
    for name, stage in STAGES.items():
        table.add_row(name, stage.about, str(stage.seconds))
    table.add_section()
    table.add_row("all", "", str(sum(stage.seconds for stage in STAGES.values())))
    return table


def has_gpu() -> bool:
    """Ask in a process of its own, as the answer takes memory of the GPU."""
    ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True).returncode == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in STAGES if name != "machine"]
    parser.add_argument("--stage", choices=names, action="append", help="a stage to run, again for another")
    parser.add_argument("--budget", type=float, help="seconds; a stage that would take longer is skipped")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU: finds what would fail early")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"lines are added to it (default: {RESULTS})")
    parser.add_argument("--describe", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.describe is not None:
        describe(arguments.describe, arguments.rehearse)
        return 0
    console = Console()
    if not arguments.rehearse and not has_gpu():
        console.print(plan())
        return 0
    table, failed = Table("stage", "status", "seconds", "what came out"), 0
    for name, line in prove(arguments.stage or names, arguments.rehearse, arguments.budget, arguments.results):
        passed, result = line["status"] == "passed", line.get("result")
        words = STAGES[name].told(result) if result else line["log"].strip().splitlines()[-1:]
        told = words if isinstance(words, str) else "".join(words)
        console.print(f"{name}: {line['status']} in {line['seconds']:.0f} s. {told}", highlight=False)
        table.add_row(name, line["status"], f"{line['seconds']:.0f}", told)
        failed += not passed and line["status"] != "skipped"
    console.print(table)
    console.print(f"Lines added to {arguments.results}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
