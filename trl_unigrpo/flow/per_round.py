"""Settings of the sampler that may differ from round to round of a trajectory."""

from typing import Any


PER_ROUND = ("num_inference_steps", "sde_window_size", "sde_window_range", "noise_level")
"""Each has one value for all rounds, or a list with one for each, the last of which holds for all later ones."""


def of_rounds(args: Any, name: str) -> list[Any]:
    """List the values of a setting by round: one where it is the same for all."""
    value = getattr(args, name)
    several = isinstance(value, list) and (name != "sde_window_range" or any(isinstance(item, list) for item in value))
    return value if several else [value]


def of_round(args: Any, name: str, number: int) -> Any:
    """Give the value of a setting in a round, counted from 0."""
    values = of_rounds(args, name)
    return values[min(number, len(values) - 1)]


def rounds_that_differ(args: Any) -> int:
    """Count the rounds that have settings of their own: 1 where all are alike."""
    return max(len(of_rounds(args, name)) for name in PER_ROUND)
