"""The scheduler that is put into a pipeline: it goes through the times that it is told, and hands every step over."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor


OnStep = Callable[[Tensor, Tensor], Tensor]
"""Takes a step's velocity (B, *latent) and the state (B, *latent) it belongs to; returns the next state."""


class HandingScheduler:
    """
    Leaves the stepping of a flow to `on_step`, on the pipeline's own schedule or on a given one.

    Args:
        scheduler: the pipeline's own, which stays as it is.

    Attributes:
        inside: what is put into the pipeline: a copy of its scheduler, as pipelines ask for its class, its
            configuration and methods of it. Its steps and times come from here.
    """

    def __init__(self, scheduler: Any):
        self.inside = copy.deepcopy(scheduler)
        self._euler = euler_like(scheduler)
        self._given: tuple[Tensor, Tensor] | None = None
        self.on_step: OnStep | None = None
        own: dict[str, Any] = {"set_timesteps": self.set_timesteps, "step": self.step}
        if not hasattr(scheduler, "scale_model_input"):
            own["scale_model_input"] = as_it_is
        vars(self.inside).update(own)

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
        inside = self.inside
        if self._given is None:
            self._euler.set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
            inside.sigmas, inside.timesteps = self._euler.sigmas, self._euler.timesteps
        else:
            times, told = (x.float().to(device) for x in self._given)
            inside.sigmas, inside.timesteps = torch.cat([times, torch.zeros_like(times[:1])]), told
        inside.num_inference_steps, inside._step_index, inside._begin_index = len(inside.timesteps), None, None

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
        assert self.on_step is not None
        following = self.on_step(model_output, sample)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=following) if return_dict else (following,)


def euler_like(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """Make the Euler scheduler of a flow that has the schedule of another one; one of that class is copied."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return copy.deepcopy(scheduler)
    config = dict(scheduler.config)
    # The multistep schedulers (DPM-Solver++, UniPC) call the shift of a flow by another name.
    if "flow_shift" in config:
        config.setdefault("shift", config["flow_shift"])
    known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    return FlowMatchEulerDiscreteScheduler(**{name: value for name, value in config.items() if name in known})


def as_it_is(sample: Tensor, timestep: Any = None) -> Tensor:
    """Scale the input of a flow's transformer: not at all."""
    return sample
