"""The whole estimate of a workload, and the line that says it."""

from dataclasses import dataclass
from typing import Any

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
        """Least seconds of each part."""
        return floor_seconds(self.workload, flops_per_second, bytes_per_second)

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Least seconds per generation, all its passes included."""
        return sum(self.seconds_by_part(flops_per_second, bytes_per_second).values())


def estimate(load: Workload) -> Estimate:
    return Estimate(load, estimate_memory(load), floor_flops(load))


def estimate_run(model: Any, args: Any) -> Estimate:
    """The estimate for a loaded BAGEL and a `UniGRPOConfig`."""
    return estimate(Workload.of_run(model, args))
