"""The cost of a generation before it runs: memory by part, FLOPs by part, the floor in seconds."""

from .communication import Traffic, traffic
from .flops import (
    decode_read_bytes,
    floor_flops,
    floor_seconds,
    overhead_flops,
)
from .memory import Memory, estimate_memory
from .report import Estimate, estimate
from .sizes import lora_parameters, parameter_counts, released_config
from .workload import Workload


__all__ = [
    "Estimate",
    "Memory",
    "Traffic",
    "Workload",
    "decode_read_bytes",
    "estimate",
    "estimate_memory",
    "floor_flops",
    "floor_seconds",
    "lora_parameters",
    "overhead_flops",
    "parameter_counts",
    "released_config",
    "traffic",
]
