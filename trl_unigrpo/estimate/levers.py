"""Advice on time: what each lever alone saves of the FLOPs of a generation with its updates, and what it costs."""

from dataclasses import dataclass, replace
from typing import Any

from ..image_sizes import plain_size
from .flops import floor_flops, overhead_flops
from .memory import estimate_memory
from .workload import Workload


@dataclass(frozen=True)
class Lever:
    """
    One change of a run.

    Attributes:
        setting: what to set.
        workload: the run with it.
        saved: share of all FLOPs that it saves, in (0, 1).
        cost: what it costs beside them.
    """

    setting: str
    workload: Workload
    saved: float
    cost: str


FEW_STEPS, LINE_STEPS, LINE_POINTS, SCOUT_STEPS = 10, 6, 3, 4


def all_flops(load: Workload) -> int:
    """Count what a generation with its updates computes: the floor, and what a run computes beyond it."""
    return sum(floor_flops(load).values()) + sum(overhead_flops(load).values())


def levers(load: Workload, limit: int | None = None) -> list[Lever]:
    """
    Find the levers that save FLOPs, each alone, the one that saves most first.

    Args:
        limit: bytes that a lever may take at its peak; None for any number. One that takes no more than the run
            itself does is never left out for it.
    """
    whole, most = all_flops(load), max(limit or 0, estimate_memory(load).peak)
    found = []
    for setting, change, cost in _changes(load):
        after = replace(load, **change)
        saved = 1 - all_flops(after) / whole
        if saved > 0 and (limit is None or estimate_memory(after).peak <= most):
            found.append(Lever(setting, after, saved, cost))
    return sorted(found, key=lambda lever: -lever.saved)


def _changes(load: Workload) -> list[tuple[str, dict[str, Any], str]]:
    """List settings, their change of the workload, and their cost in words."""
    group = load.num_generations
    changes: list[tuple[str, dict[str, Any], str]] = []
    smaller = plain_size((load.size[0] // 2, load.size[1] // 2))
    least = 1 if load.lines else load.sde_window_size + 1
    fixed = load.scout_num_inference_steps if load.scout_generations else 1
    if (steps := max(FEW_STEPS, least, fixed)) < load.num_inference_steps:
        cost = "other noisy steps, to which the constants are carried; images are evaluated at all steps"
        changes.append((f"num_inference_steps={steps}", {"num_inference_steps": steps}, cost))
    if not load.lines and load.num_rounds == 1 and fixed <= LINE_STEPS < load.num_inference_steps:
        lines = {"lines": True, "sde_window_size": LINE_POINTS, "num_inference_steps": LINE_STEPS, "reference": False}
        setting = f'image_objective="nft", matching_samples={LINE_POINTS}, num_inference_steps={LINE_STEPS}, '
        cost = "another objective than the paper's, without a tie to the reference: watch the images"
        changes.append((setting + 'flow_regularizer="none"', lines, cost))
    if load.num_iterations > 1:
        cost = "half of the optimizer steps of a generation, or fewer: reward rises more slowly with generations"
        changes.append(("num_iterations=1", {"num_iterations": 1}, cost))
    if load.reference:
        cost = "nothing holds the images near the reference"
        changes.append(('flow_regularizer="none"', {"reference": False}, cost))
    if load.gradient_checkpointing:
        changes.append(("gradient_checkpointing=False", {"gradient_checkpointing": False}, "memory"))
    if all(side >= 512 and side // 2 % load.config.pixels_per_token == 0 for side in load.size):
        changes.append((f"image_size={smaller}", {"image_size": smaller}, "what is learnt is learnt at another size"))
    if load.num_rounds == 1:
        each, alone = 2 * load.images_per_thinking, load.scout_generations is None and load.images_per_thinking == 1
        if load.scout_generations is None and group % each == 0 and each < group:
            cost = "half of the thinkings: at equal rollouts the text learns more slowly, the painter better"
            changes.append((f"images_per_thinking={each}", {"images_per_thinking": each}, cost))
        half = group // 2
        if alone and group % 2 == 0 and half > 1 and (load.lines or load.num_inference_steps >= SCOUT_STEPS):
            steps = load.num_inference_steps if load.lines else SCOUT_STEPS
            scouts = {"scout_generations": group, "num_generations": half, "scout_num_inference_steps": steps}
            setting = ", ".join(f"{name}={value}" for name, value in scouts.items())
            cost = "half as many images are trained, the best and the worst; under noise scouts rank less well"
            changes.append((setting, scouts, cost))
    return changes
