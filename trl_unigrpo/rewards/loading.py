"""Reward functions by name, as the command line and files of settings have them."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .common import Asker


# TRL's own, under the name that TRL's command line has for it.
SHORT_NAMES = {"think_format_reward": "trl.rewards:think_format_reward"}
NO_REWARD = "{!r} names no reward. Write it as module:NAME, such as my_rewards:redness."


def load_reward(path: str, asker: Asker | None = None) -> Callable[..., Any]:
    """
    Load the reward at `module:NAME`: a function, a callable object, or a class that is made without arguments, or of a
    judge alone.

    The module is installed, or lies in the working directory. `module.NAME` is read as `module:NAME`, and
    `think_format_reward` alone is TRL's.

    Args:
        asker: the judge for a class that needs one, its `asker`, such as [`EditReward`].

    Raises:
        ValueError: if there is none, or it can't be called as a reward.
    """
    module, name = split_path(path)
    find_working_directory()
    try:
        value: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{path!r} can't be imported ({error}). Is the module in the working directory or installed?"
        ) from error
    if inspect.isclass(value):
        kind: Callable[..., Any] = value
        if (asks := _asks(kind)) and asker is None:
            raise ValueError(
                f"{path!r} asks a judge: name one beside it, by --judge-model and --judge-base-url, or make an "
                "instance of it in a module and name that."
            )
        try:
            value = kind(asker) if asks else kind()
        except TypeError as error:
            raise ValueError(
                f"{path!r} is a class that can't be made without arguments ({error}). Make an instance of it in a "
                "module and name that."
            ) from error
    check_reward(path, value)
    return value


def _asks(kind: Callable[..., Any]) -> bool:
    """Say whether a class is made with a judge."""
    try:
        return "asker" in inspect.signature(kind).parameters
    except (TypeError, ValueError):  # some classes written in C tell nothing of it
        return False


def load_judged(paths: Sequence[str], asker: Asker | None) -> dict[str, Callable[..., Any]]:
    """
    Load rewards by their names, as [`load_reward`] does; ValueError for a judge that none of them asks.
    """
    rewards = {path: load_reward(path, asker) for path in paths}
    if asker is not None and not any(getattr(reward, "asker", None) is asker for reward in rewards.values()):
        raise ValueError(
            f"No reward among {', '.join(map(repr, paths))} asks the judge. Leave it out, or name one that does, such "
            "as trl_unigrpo.rewards:EditReward."
        )
    return rewards


def split_path(path: str) -> tuple[str, str]:
    """Module and name of `module:NAME` or `module.NAME`; ValueError for another form."""
    path = SHORT_NAMES.get(path, path)
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module or module.startswith(".") or not name:
        raise ValueError(NO_REWARD.format(path))
    return module, name


def find_working_directory() -> None:
    """
    Let modules of the working directory be imported, as `python -m` does.

    It stays so: a reward may import its neighbours as late as in its first call.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def check_reward(path: str, value: Any) -> None:
    """Raise ValueError if what a path names can't be called with prompts, completions, images and columns."""
    if inspect.ismodule(value) and ":" not in path:
        raise ValueError(NO_REWARD.format(path))
    if not callable(value):
        raise ValueError(f"{path!r} is a {type(value).__name__}, expected a function or a callable object.")
    try:
        inspect.signature(value).bind_partial(prompts=[], completions=[], images=[])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path!r} can't be called as a reward ({error}): expected one that takes prompts, completions, images "
            "and **columns."
        ) from error
