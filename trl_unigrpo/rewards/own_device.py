"""The device of a model that computes in this process."""

from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState


class OwnDevice:
    """
    Base of what computes with a model in this process: on the device that was asked for, else on the process' own.

    That is asked of accelerate when the model is first used: a reward that is built before the run's configuration is
    built before any process knows which GPU is its own, and all would take the first.
    """

    model: Any
    wanted_device: torch.device | str | None = None

    @cached_property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device(self.wanted_device) if self.wanted_device is not None else PartialState().device

    def placed(self) -> Any:
        """Give the model, on its device."""
        with torch.inference_mode(False):  # weights that are made in it have no gradients for good
            return self.model.to(self.device)
