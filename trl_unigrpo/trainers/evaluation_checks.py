"""Checks of evaluation: that it happens, that it can, and that its metric exists."""

import warnings
from collections.abc import Mapping
from typing import Any


def check_evaluation(args: Any, eval_dataset: Any) -> None:
    """
    Raise ValueError for an evaluation that can't be, and warn of an `eval_dataset` that none uses.

    Args:
        args: the configuration.
        eval_dataset: a dataset, a dict of them, or None.
    """
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    if eval_dataset is None:
        if evaluates:
            raise ValueError(
                f"eval_strategy={str(args.eval_strategy.value)!r} with eval_on_start={args.eval_on_start}, but there "
                "is no eval_dataset. Pass one, or switch evaluation off."
            )
        return
    if not (evaluates or args.do_eval):
        warnings.warn(
            "eval_dataset is not used while training: eval_strategy is 'no'. Set eval_strategy='steps' and eval_steps "
            "to watch it, or do_eval=True if you call trainer.evaluate() yourself."
        )
    metric = args.metric_for_best_model
    if metric is not None and isinstance(eval_dataset, Mapping):
        sets = list(eval_dataset)
        if not metric.removeprefix("eval_").startswith(tuple(f"{name}_" for name in sets)):
            raise ValueError(
                f"metric_for_best_model={metric!r} is of none of the evaluation sets {sets}, each of which has "
                f"metrics of its own. Name one, such as 'eval_{sets[0]}_reward'."
            )


def whole_groups(per_device: int | None, group: int, processes: int) -> int:
    """
    Choose how many trajectories a process evaluates at once, about eight, so that all processes' make whole groups.

    Raises:
        ValueError: if `per_device`, the user's number, does not.
    """
    if per_device is None:
        least = next(n for n in range(1, group + 1) if n * processes % group == 0)
        return least * max(1, 8 // least)
    if per_device * processes % group:
        raise ValueError(
            f"per_device_eval_batch_size={per_device} on {processes} process{'es' * (processes > 1)} holds no whole "
            f"groups of {group} trajectories: expected a multiple of {group} in all. Leave it unset, or set "
            "num_generations_eval=1."
        )
    return per_device
