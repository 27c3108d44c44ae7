"""The least that a run will cost, said once at its start."""

import logging
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..estimate.hardware import copy_rate, matmul_rate
from ..estimate.report import estimate_run
from ..models.registry import unified_model


logger = logging.getLogger(__name__)


class ExpectedCost(TrainerCallback):
    """
    A callback that prints, on a GPU, the least seconds per generation and the peak of memory that the model estimates.

    Models whose class has no estimate (`trl_unigrpo.estimate.report.ESTIMATES`) are skipped. Never stops a run.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or args.device.type != "cuda":
            return
        try:
            line = self._line(model, args)
        except Exception as error:
            logger.debug("No estimate of the cost: %s", error)
            return
        if line is not None:
            print(line, flush=True)

    def _line(self, model: Any, args: TrainingArguments) -> str | None:
        total = torch.cuda.get_device_properties(args.device).total_memory
        rates = matmul_rate(args.device, size=4096), copy_rate(args.device, size=2**26)
        return expected_cost(model, args, *rates, total)


def expected_cost(model: Any, args: Any, flops_per_second: float, bytes_per_second: float, memory: int) -> str | None:
    """
    Write the line to print; None if the model's class has no estimate.

    Args:
        flops_per_second, bytes_per_second: what the device reaches.
        memory: of the device, in bytes.
    """
    found = estimate_run(unified_model(model), args)
    if found is None:
        return None
    seconds = found.floor_seconds(flops_per_second, bytes_per_second)
    return (
        f"Expected: at least {seconds:.3g} s per generation and its {args.num_iterations} optimizer steps at "
        f"{flops_per_second / 1e12:.3g} TFLOP/s; peak memory {found.memory.peak / 2**30:.3g} of "
        f"{memory / 2**30:.3g} GiB."
    )
