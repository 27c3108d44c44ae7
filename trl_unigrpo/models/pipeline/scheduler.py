"""The scheduler that is put into a pipeline: it goes through the times that it is told, and hands every step over."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor


OnStep = Callable[[Tensor, Tensor], Tensor]
"""Takes a step's velocity (B, *latent) and the state (B, *latent) it belongs to; returns the next state."""


class HandingScheduler(FlowMatchEulerDiscreteScheduler):
    """A flow-matching scheduler that leaves the stepping to `on_step`, on a schedule of its own or on a given one."""

    _given: tuple[Tensor, Tensor] | None = None
    on_step: OnStep

    @classmethod
    def like(cls, scheduler: Any) -> "HandingScheduler":
        """Make one with the configuration of a pipeline's own scheduler of a flow, of whatever class that is."""
        config = dict(scheduler.config)
        # The multistep schedulers (DPM-Solver++, UniPC) call the shift of a flow by another name.
        if "flow_shift" in config:
            config.setdefault("shift", config["flow_shift"])
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        return cls(**{name: value for name, value in config.items() if name in known})

    def follow(self, given: tuple[Tensor, Tensor] | None, on_step: OnStep) -> None:
        """
        Set what the next run goes through.

        Args:
            given: flow times in [0, 1] and, for each, the number that the transformer is told; (steps,), or
                (steps, B) for times of each sample's own. None for the schedule that the pipeline asks for.
            on_step: takes the steps.
        """
        self._given, self.on_step = given, on_step

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        if self._given is None:
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
            return
        times, told = (x.float().to(device) for x in self._given)
        self.sigmas, self.timesteps = torch.cat([times, torch.zeros_like(times[:1])]), told
        self.num_inference_steps, self._step_index, self._begin_index = len(times), None, None

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        generator: torch.Generator | None = None,  # named, as some pipelines look for it here
        return_dict: bool = True,
        **options: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Hand a step over, as diffusers' own `step` is called; its options are for steps of its own."""
        following = self.on_step(model_output, sample)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=following) if return_dict else (following,)
