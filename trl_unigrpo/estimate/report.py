"""The whole estimate of a workload, and the line that says it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..models.bagel.modeling import BagelForUnifiedGeneration
from .flops import floor_flops, floor_seconds
from .memory import Memory, estimate_memory
from .workload import Workload


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        workload: what was estimated.
        memory: bytes by part and peak by phase.
        flops: the floor's FLOPs by part.
    """

    workload: Workload
    memory: Memory
    flops: dict[str, int]

    def seconds_by_part(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """Give the least seconds of each part."""
        return floor_seconds(self.workload, flops_per_second, bytes_per_second)

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Give the least seconds per generation, all its passes included."""
        return sum(self.seconds_by_part(flops_per_second, bytes_per_second).values())


def estimate(load: Workload) -> Estimate:
    return Estimate(load, estimate_memory(load), floor_flops(load))


ESTIMATES: dict[type, Callable[[Any, Any], Any]] = {
    BagelForUnifiedGeneration: lambda model, args: estimate(Workload.of_run(model, args))
}
"""Model class -> the estimate of a run of that model, as it is loaded, with a `UniGRPOConfig`."""


def estimate_run(model: Any, args: Any) -> Any:
    """Estimate a run by the model's class or the nearest of its parents; None where no class has an estimate."""
    found = next((ESTIMATES[parent] for parent in type(model).__mro__ if parent in ESTIMATES), None)
    return None if found is None else found(model, args)
