"""Seconds, peak memory and FLOPs of a trainer's generation by phase, and how far its rollout is from its training."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from trl_unigrpo import UniGRPOTrainer
from trl_unigrpo.estimate.hardware import synchronize
from trl_unigrpo.flow import log_ratio
from trl_unigrpo.flow.states import SDESteps
from trl_unigrpo.monitoring.events import ImageLoss, Watcher


PHASES = ("thinking", "denoising", "VAE decode", "old log-probs", "reference pass", "update", "optimizer")


class Phases:
    """
    Seconds, peak memory and counted FLOPs by phase. A phase that begins inside another one interrupts it.

    Args:
        device: of the model; waited for at every change of phase.
        flops: tells the FLOPs so far; None if they aren't counted, or not yet (`counted_by`).
        clock: tells the seconds: those that pass, or `time.process_time` for those that the CPU works.
    """

    def __init__(
        self,
        device: torch.device,
        flops: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.device, self.flops, self.clock = device, flops, clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self.counted: dict[str, int] = defaultdict(int)
        self.calls: dict[str, list[float]] = defaultdict(list)  # seconds of each call of a watched method
        self.failed: str | None = None  # the innermost phase that an exception left
        self._stack: list[str] = []
        self._watched: list[tuple[Any, str]] = []
        self._since, self._before = 0.0, 0

    def _switch(self) -> None:
        synchronize(self.device)
        now, flops = self.clock(), self.flops() if self.flops else 0
        if self._stack:
            name = self._stack[-1]
            self.seconds[name] += now - self._since
            self.counted[name] += flops - self._before
            if self.device.type == "cuda":
                self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated(self.device))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since, self._before = self.clock(), flops

    def enter(self, name: str) -> None:
        self._switch()
        self._stack.append(name)

    def leave(self) -> None:
        self._switch()
        self._stack.pop()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        except BaseException:
            self.failed = self.failed or self._stack[-1]
            raise
        finally:
            self.leave()

    @contextmanager
    def counted_by(self, counting: AbstractContextManager[Any]) -> Iterator[None]:
        """Count the FLOPs of what runs inside by a counter that `counting` enters."""
        with counting as counter:
            self.flops = counter.get_total_flops
            yield
        self.flops = None

    def watch(self, owner: Any, method: str, name: str, when: Callable[[], bool] = lambda: True) -> None:
        """Make every call of a method a phase, if `when` says so at the time."""
        original = getattr(owner, method)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return original(*args, **kwargs)
            before = self.seconds[name]
            with self(name):
                result = original(*args, **kwargs)
            self.calls[name].append(self.seconds[name] - before)
            return result

        setattr(owner, method, watched)
        self._watched.append((owner, method))

    def excess_of_first_calls(self) -> dict[str, float]:
        """Give the seconds of each phase's first call beyond the median of the others: kernels in the making."""
        return {name: max(0.0, calls[0] - median(calls[1:])) for name, calls in self.calls.items() if len(calls) > 2}

    def unwatch(self) -> None:
        """Give back the methods that are watched."""
        while self._watched:
            delattr(*self._watched.pop())  # the watched one hid that of the class


class OptimizerPhase(TrainerCallback):
    def __init__(self, phases: Phases):
        self.phases = phases

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.phases.enter("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.phases.leave()


def watch_trainer(trainer: UniGRPOTrainer, phases: Phases) -> list[torch.Tensor]:
    """Tell the phases of a trainer apart; returns the list that the first pass's log-ratios are added to."""
    no_grad = lambda: not torch.is_grad_enabled()  # noqa: E731
    phases.watch(trainer, "training_step", "update")
    phases.watch(trainer, "_prepare_inputs", "rewards and data")
    phases.watch(trainer, "_generate_single_turn", "thinking")
    phases.watch(trainer, "_paint", "denoising")
    phases.watch(trainer.unified, "decode_latents", "VAE decode")
    phases.watch(trainer, "_velocities", "reference pass")
    phases.watch(trainer, "_get_per_token_logps_and_entropies", "old log-probs", when=no_grad)
    trainer.add_callback(OptimizerPhase(phases))
    ratios = LogRatios()
    trainer.add_callback(ratios)
    return ratios.shares


class LogRatios(Watcher):
    """Collects what [`log_ratio_shares`] says of the first pass over each micro-batch."""

    def __init__(self) -> None:
        self.shares: list[torch.Tensor] = []

    def on_image_loss(self, args: Any, state: Any, control: Any, image_loss: ImageLoss, **kwargs: Any) -> None:
        if image_loss.first_pass:
            self.shares.append(log_ratio_shares(image_loss.velocity, image_loss.states, image_loss.objective))


def log_ratio_shares(velocity: torch.Tensor, states: SDESteps, objective: Any) -> torch.Tensor:
    """(S,) log-ratios of a training forward's velocities against the rollout's, over the clip range."""
    sampled, transition = states.velocity.to(velocity), objective.transition(states)
    ratio = log_ratio(states.x, states.x_next, velocity, sampled, transition, objective.args.ratio_norm)
    return (ratio / objective.clip_range(velocity)).cpu()
