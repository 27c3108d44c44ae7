"""Process rewards: reward functions that judge the thinking alone, not the image that it led to."""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any


SCOPES = ("both", "text")


def thinking_reward(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    Mark a TRL reward function as a process reward: its advantage joins that of the thinking, never the image's.

    The function itself, which may be asynchronous or an object, stays as it is. [`UniGRPOConfig`]'s
    `process_reward_weight` says how much the marked functions count; `reward_weights` weighs them among each other.

    ```python
    @thinking_reward
    def short(prompts, completions, **columns):
        return [-len(completion) / 1000 for completion in completions]
    ```

    Raises:
        TypeError: for what is not a function of this process, such as the name of a reward model.
    """
    if not callable(function) or hasattr(function, "named_parameters"):
        raise TypeError(
            f"thinking_reward got a {type(function).__name__}, expected a reward function. Call a reward model in one."
        )
    marked: Any = partial(function)  # under the function's own name in TRL's metrics
    update_wrapper(marked, function, updated=())
    marked.scope = "text"
    return marked


def reward_scope(function: Any) -> str:
    """
    Say what a reward function trains: "both", the thinking and the image, or "text", the thinking alone.

    Raises:
        ValueError: if the function has an attribute `scope` that is neither.
    """
    while isinstance(function, partial) and not hasattr(function, "scope"):
        function = function.func
    scope = getattr(function, "scope", "both")
    if scope not in SCOPES:
        raise ValueError(f"The reward function {function!r} has scope={scope!r}: expected 'both' or 'text'.")
    return scope
