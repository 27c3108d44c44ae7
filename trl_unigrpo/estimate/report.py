"""The whole estimate of a workload, and the line that says it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ..image_sizes import Size
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
        sizes: of the images, where these differ from group to group; the workload has the largest.
    """

    workload: Workload
    memory: Memory
    flops: dict[str, int]
    sizes: Sequence[Size] = ()

    def seconds_by_part(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """Give the least seconds of each part; of several sizes the mean."""
        loads = [replace(self.workload, image_size=size) for size in self.sizes or [self.workload.size]]
        each = [floor_seconds(load, flops_per_second, bytes_per_second) for load in loads]
        return {name: fmean(seconds[name] for seconds in each) for name in each[0]}

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Give the least seconds per generation, all its passes included."""
        return sum(self.seconds_by_part(flops_per_second, bytes_per_second).values())


def estimate(load: Workload, sizes: Sequence[Size] = ()) -> Estimate:
    """
    Estimate a workload.

    Args:
        sizes: of its images, of which groups have one each, alike often; FLOPs are then their mean.
    """
    each = [floor_flops(replace(load, image_size=size)) for size in sizes or [load.size]]
    flops = {name: round(fmean(parts[name] for parts in each)) for name in each[0]}
    return Estimate(load, estimate_memory(load), flops, sizes)


ESTIMATES: dict[type, Callable[[Any, Any], Any]] = {
    BagelForUnifiedGeneration: lambda model, args: estimate(Workload.of_run(model, args), args.sizes(training=True))
}
"""Model class -> the estimate of a run of that model, as it is loaded, with a `UniGRPOConfig`."""


def estimate_run(model: Any, args: Any) -> Any:
    """Estimate a run by the model's class or the nearest of its parents; None where no class has an estimate."""
    found = next((ESTIMATES[parent] for parent in type(model).__mro__ if parent in ESTIMATES), None)
    return None if found is None else found(model, args)
