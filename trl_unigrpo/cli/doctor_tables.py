"""Tables of `trl-unigrpo doctor`: does a run fit on this machine, and how long will a step take at least?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..estimate.advice import advise
from ..estimate.communication import NVLINK, traffic
from ..estimate.flops import overhead_flops
from ..estimate.hardware import (
    copy_rate,
    device_name,
    machine_versions,
    matmul_rate,
)
from ..estimate.levers import Lever, all_flops, levers
from ..estimate.memory import RESIDENT
from ..estimate.report import Estimate, estimate
from ..estimate.sizes import parameter_counts, released_config
from ..estimate.workload import Workload
from ..models.bagel.configuration import BagelConfig


# Share of a GPU's memory that a run can fill: the CUDA context and fragments take the rest.
USABLE = 0.92
GIB = 2**30


def read_config(model: str | None) -> BagelConfig:
    """The sizes of a folder or hub id, or of the released 7B. Raises OSError if there is no BAGEL."""
    return released_config() if model is None else BagelConfig.from_pretrained(model)


def run_doctor(
    model: str | None = None,
    memory_gib: float | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    interconnect: float | None = None,
    dry: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> Estimate:
    """
    Print versions, memory, FLOPs, and whether the run fits.

    Args:
        model: folder or hub id; None for the released 7B's sizes.
        memory_gib: memory to fit into, in GiB; None for that of the GPU found.
        tflops, bandwidth: rates in TFLOP/s and TB/s; None to measure them on the GPU found.
        interconnect: GB/s that reach a GPU from the others; None for NVLink's.
        dry: also run one step with random weights.
        settings: of the [`Workload`].

    Raises:
        OSError, ValueError: for a folder without a BAGEL, or settings that no run can have.
    """
    rates = {"memory": memory_gib, "tflops": tflops, "bandwidth": bandwidth, "interconnect": interconnect}
    for name, value in rates.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value:g}: expected a number above 0.")
    if dry and settings.get("processes", 1) > 1:
        raise ValueError("A dry run is one of one GPU: leave --processes out, or --dry-run.")
    console = console or Console()
    result = estimate(Workload(read_config(model), **settings))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        memory_gib = memory_gib or torch.cuda.get_device_properties(device).total_memory / GIB
        tflops = tflops or matmul_rate(device) / 1e12
        bandwidth = bandwidth or copy_rate(device) / 1e12
    interconnect = interconnect or NVLINK
    console.print(_machine(device, memory_gib, tflops, bandwidth))
    console.print(_memory_parts(result), _peaks(result))
    console.print(_flops(result, tflops, bandwidth))
    if result.workload.processes > 1:
        console.print(
            _traffic(result.workload, interconnect), _per_gpu(result.workload, tflops, bandwidth, interconnect)
        )
    _verdict(console, result, memory_gib)
    found = levers(result.workload, int(memory_gib * GIB * USABLE) if memory_gib else None)
    if found:
        console.print(_levers(result, found))
        most = f"{found[0].setting}, {found[0].saved:.0%}"
        console.print(f"Saves most of a generation's FLOPs: {most}. What it does to rewards is not known.")
    if dry:
        _dry_run(console, result, device)
    return result


def _machine(device: torch.device, memory: float | None, tflops: float | None, bandwidth: float | None) -> Table:
    table = Table("machine", "", title="Machine")
    for name, found in machine_versions().items():
        table.add_row(name, found)
    table.add_row("GPU", device_name(device) if device.type == "cuda" else "none found")
    if memory:
        table.add_row("memory to fit into", f"{memory:.1f} GiB")
    if tflops:
        table.add_row("matrix products", f"{tflops:.0f} TFLOP/s")
    if bandwidth:
        table.add_row("memory bandwidth", f"{bandwidth:.2f} TB/s")
    return table


def _memory_parts(result: Estimate) -> Table:
    load, parts = result.workload, result.memory.parts
    parameters = sum(parameter_counts(load.config).values())
    height, width = load.size
    title = f"Memory by part, {parameters / 1e9:.2f} G parameters, {height} x {width} pixels"
    table = Table("part", "GiB", "held", title=title)
    for name, size in parts.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}", "all the time" if name in RESIDENT else "in its phase")
    return table


def _peaks(result: Estimate) -> Table:
    table = Table("phase", "peak GiB", title="Peak by phase")
    for name, size in result.memory.peaks.items():
        table.add_row(name, f"{size / GIB:.2f}", style="bold" if size == result.memory.peak else "")
    return table


def _flops(result: Estimate, tflops: float | None, bandwidth: float | None) -> Table:
    load = result.workload
    title = f"FLOPs per generation: {load.trajectories} trajectories, {load.num_iterations} optimizer steps"
    table = Table("part", "PFLOP", "floor, seconds", title=title)
    seconds: dict[str, float] = {}
    if tflops:
        # Without a bandwidth, decoding is bounded by its FLOPs alone.
        seconds = result.seconds_by_part(tflops * 1e12, bandwidth * 1e12 if bandwidth else float("inf"))
    for name, flops in result.flops.items():
        table.add_row(name, f"{flops / 1e15:.3f}", f"{seconds[name]:.1f}" if seconds else "-")
    table.add_section()
    total = f"{sum(seconds.values()):.1f}" if seconds else "- (no GPU: give --tflops)"
    table.add_row("floor", f"{sum(result.flops.values()) / 1e15:.3f}", total, style="bold")
    for name, flops in overhead_flops(load).items():
        table.add_row(f"beyond it: {name}", f"{flops / 1e15:.3f}", "")
    return table


def _traffic(load: Workload, interconnect: float) -> Table:
    """Say what travels in a generation with its updates: seconds beside the floor's, where nothing hides them."""
    how = "FSDP2" if load.fsdp else "DDP"
    title = f"What reaches a GPU: {load.processes} processes, {how}, {interconnect:g} GB/s"
    table = Table("part", "times", "GB received", "seconds", title=title)
    parts = traffic(load)
    for name, part in parts.items():
        table.add_row(name, str(part.times), f"{part.bytes / 1e9:.1f}", f"{part.bytes / 1e9 / interconnect:.2f}")
    whole = sum(part.bytes for part in parts.values()) / 1e9
    table.add_section()
    table.add_row("all", "", f"{whole:.1f}", f"{whole / interconnect:.2f}", style="bold")
    return table


def _per_gpu(load: Workload, tflops: float | None, bandwidth: float | None, interconnect: float) -> Table:
    """Compare adapters and full fine-tuning at two sizes, with all other settings of the workload."""
    table = Table("per GPU", "peak GiB", "floor, seconds", "GB received", "seconds", title="The same run with")
    adapters = load.lora_ranks or (32, 32)
    unit, most = load.config.pixels_per_token, load.config.max_latent_size
    for name, ranks in {f"LoRA, rank {max(adapters)}": adapters, "full fine-tuning": None}.items():
        for size in [size for size in (512, 1024) if size % unit == 0 and size <= unit * most]:
            one = estimate(replace(load, lora_ranks=ranks, image_size=size))
            floor = one.floor_seconds(tflops * 1e12, bandwidth * 1e12) if tflops and bandwidth else None
            received = sum(part.bytes for part in traffic(one.workload).values()) / 1e9
            cells = (f"{one.memory.peak / GIB:.1f}", f"{floor:.1f}" if floor else "-", f"{received:.1f}")
            table.add_row(f"{name}, {size} pixels", *cells, f"{received / interconnect:.2f}")
    return table


def _levers(result: Estimate, found: Sequence[Lever]) -> Table:
    title = f"Time: each lever alone, of {all_flops(result.workload) / 1e15:.3f} PFLOP that a generation computes"
    table = Table("lever", "PFLOP", "saved", "what it costs", title=title)
    for lever in found:
        table.add_row(lever.setting, f"{all_flops(lever.workload) / 1e15:.3f}", f"{lever.saved:.1%}", lever.cost)
    return table


def _verdict(console: Console, result: Estimate, memory: float | None) -> None:
    peak = result.memory.peak
    if memory is None:
        console.print(f"Peak {peak / GIB:.1f} GiB. No GPU found; --memory says what to fit into.")
        return
    limit = int(memory * GIB * USABLE)
    if peak <= limit:
        console.print(f"Fits: peak {peak / GIB:.1f} GiB of {memory:.1f} GiB ({USABLE:.0%} usable).", style="green")
        return
    console.print(
        f"Does not fit: peak {peak / GIB:.1f} GiB, {limit / GIB:.1f} GiB usable of {memory:.1f}.", style="red"
    )
    table = Table("change, on top of those above", "peak GiB", "PFLOP", title="Advice")
    advice = advise(result.workload, limit)
    for item in advice:
        flops = sum(estimate(item.workload).flops.values())
        table.add_row(item.setting, f"{item.peak / GIB:.1f}", f"{flops / 1e15:.2f}")
    console.print(table)
    least = advice[-1].peak if advice else peak
    if least > limit:
        console.print(f"Even so it needs {least / GIB:.1f} GiB: take a larger GPU or a smaller model.", style="red")


def _dry_run(console: Console, result: Estimate, device: torch.device) -> None:
    from ..trainers.dry_run import dry_run

    measured = dry_run(replace(result.workload, half=result.workload.half and device.type == "cuda"), device)
    line = f"Dry run with random weights: {measured.seconds:.1f} s for one generation and its passes"
    line += f", thinkings of {min(measured.lengths)} to {max(measured.lengths)} tokens"
    if measured.peak_bytes is not None:
        line += f", peak {measured.peak_bytes / GIB:.1f} GiB measured, {result.memory.peak / GIB:.1f} GiB estimated"
    console.print(f"{line}.")
