"""The machine and what it can do: versions, memory, measured rates."""

import platform
import time
from collections.abc import Callable

import torch

from ..__about__ import versions


def machine_versions() -> dict[str, str]:
    """List the versions of what a step's cost depends on, "not installed" where it isn't."""
    return {"python": platform.python_version(), **versions("bitsandbytes"), "CUDA": torch.version.cuda or "none"}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def matmul_rate(device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure the FLOP/s of a square matrix product, the best of a few: what a model can reach at most."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def copy_rate(device: torch.device, size: int = 2**28) -> float:
    """Measure the bytes/s that copying reads and writes, the best of a few."""
    x = torch.empty(size, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    return 2 * size / _seconds(lambda: y.copy_(x), device)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Measure the least seconds of a call, after one to warm up."""
    best = float("inf")
    for warm in (False, *[True] * repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        if warm:
            best = min(best, time.perf_counter() - started)
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
