"""Checks of reward functions and callbacks: what was handed over, under which names, and whether it can be called."""

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..rewards.thinking import reward_scope
from .trl_bridge import get_callable_name


GIVEN = ("prompts", "completions", "completion_ids", "images", "trainer_state", "log_extra", "log_metric")
"""Arguments that TRL and this trainer hand to every reward function, beside the dataset's columns."""
OF_ROUNDS = ("previous_images", "source_images", "round_index")
"""Those that they get beside these where trajectories have several rounds."""
KEPT_BACK = ("prompt", "completion", "completion_ids")
"""Columns that TRL does not hand over."""


def as_list(value: Any) -> list[Any]:
    """Make a list of one thing or of several in whatever holds them; of None an empty one."""
    if value is None:
        return []
    one = callable(value) or isinstance(value, (str, nn.Module, TrainerCallback, Mapping))
    return [value] if one or not isinstance(value, Iterable) else list(value)


def callback_list(callbacks: Any) -> list[Any]:
    """Give one or several callbacks as a list; TypeError for what is none."""
    listed = as_list(callbacks)
    for callback in listed:
        kind = callback if inspect.isclass(callback) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(
                f"callbacks has a {kind.__name__}, expected a transformers.TrainerCallback. Make a class of it that "
                "derives from TrainerCallback."
            )
    return listed


def check_reward_funcs(reward_funcs: Sequence[Any], args: Any, columns: Iterable[str]) -> None:
    """
    Raise ValueError or TypeError for rewards that can't be called, or that train nothing.

    Args:
        reward_funcs: functions, reward models, or names of such.
        args: the configuration.
        columns: of the datasets, which functions get as arguments.
    """
    if not reward_funcs:
        raise ValueError("No reward source provided: reward_funcs is empty. Pass a function that scores images.")
    given, columns = list(GIVEN), list(columns)
    if args.most_rounds > 1:
        given += OF_ROUNDS
        for name in ("previous_images", "round_index"):
            if name in columns:
                raise ValueError(
                    f"The dataset has a column {name!r}, but with several rounds reward functions get {name} from the "
                    "trainer. Rename the column."
                )
    for function in reward_funcs:
        if isinstance(function, (str, nn.Module)):
            continue
        if inspect.isclass(function):
            raise TypeError(f"reward_funcs has the class {function.__name__}, expected an instance: call it.")
        if not callable(function):
            raise TypeError(f"reward_funcs has a {type(function).__name__}, expected a function or a list of them.")
        own = () if args.remove_unused_columns else (name for name in columns if name not in KEPT_BACK)
        _check_call(function, [*given, *own], given)
    weights = args.reward_weights
    if weights is not None and len(weights) != len(reward_funcs):
        raise ValueError(
            f"reward_weights={weights} has {len(weights)} numbers, expected one for each of the {len(reward_funcs)} "
            "reward_funcs."
        )
    if weights is not None and not any(weights):
        raise ValueError(f"reward_weights={weights}: nothing would be trained. Give one reward a weight above 0.")
    _check_scopes(reward_funcs, args.process_reward_weight)


def _check_call(function: Any, arguments: Iterable[str], given: Sequence[str]) -> None:
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a decorator may take more than it passes on
    except (TypeError, ValueError):  # of a function that isn't Python's
        return
    try:
        signature.bind(**dict.fromkeys(arguments))
    except TypeError as error:
        raise TypeError(
            f"The reward function {get_callable_name(function)!r} can't be called: {error}. It gets "
            f"{', '.join(given)} and the dataset's columns by name. Take what it needs, and the rest as **columns."
        ) from error


def _check_scopes(reward_funcs: Sequence[Any], process_reward_weight: float) -> None:
    """Raise ValueError if no reward function scores the image, or a weight waits for process rewards in vain."""
    scopes = [reward_scope(function) for function in reward_funcs]
    if "both" not in scopes:
        raise ValueError(
            "All reward_funcs are marked as rewards of the thinking alone: none scores the image. Add one that does, "
            "or pass them unmarked."
        )
    if process_reward_weight > 0 and "text" not in scopes:
        raise ValueError(
            f"process_reward_weight={process_reward_weight}, but no reward function is marked as a reward of the "
            "thinking alone. Mark it, thinking_reward(function), or set the weight to 0."
        )
    if process_reward_weight == 0 and "text" in scopes:
        warnings.warn("Rewards of the thinking alone are logged, not trained on: process_reward_weight is 0.")


def distinct(names: Iterable[str]) -> list[str]:
    """Number the names that stand before: Judge, Judge_2."""
    found: list[str] = []
    for name in names:
        number, new = 2, name
        while new in found:
            number, new = number + 1, f"{name}_{number}"
        found.append(new)
    return found
