"""Start-up checks of what has ruined runs elsewhere: each looks at the first generation and says what to do."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..flow import Transition
from ..flow.scaling import ratio_width
from ..flow.states import SDESteps, columns
from ..flow.transition import expand_left
from ..trajectory import Image, Trajectory
from .events import ImageLoss, Rollout, Update, Watcher


class TrustError(RuntimeError):
    """A start-up check failed."""


class TrustChecks(Watcher):
    """
    The checks of one run. Each runs once, but for the noise and the window, which every generation has anew.

    Args:
        mode: "raise" or "warn".
    """

    def __init__(self, mode: str):
        self.mode = mode
        self._done: set[str] = set()

    def _first(self, name: str) -> bool:
        first = name not in self._done
        self._done.add(name)
        return first

    def _report(self, problem: str | None) -> None:
        if problem is None:
            return
        message = f"Start-up check failed: {problem} (trust_checks='warn' goes on regardless.)"
        if self.mode == "raise":
            raise TrustError(message)
        warnings.warn(message, stacklevel=3)

    def on_ready(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is not None and self._first("weights"):
            self._report(weights_problem(model))

    def on_rollout_begin(
        self, args: Any, state: Any, control: Any, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> None:
        if generation_config is not None and self._first("sampling"):
            self._report(sampling_problem(generation_config, args.temperature))

    def on_rollout(self, args: Any, state: Any, control: Any, rollout: Rollout, **kwargs: Any) -> None:
        images = [image for trajectory in rollout.trajectories for _, image in trajectory.painted()]
        if self._first("states"):
            self._report(dtype_problem(images))
        if rollout.transition is not None:
            self._report(noise_problem(rollout, rollout.transition))
        if rollout.windows is not None:
            if any(not torch.equal(image.steps.t, images[0].steps.t) for image in images):
                self._report(
                    "images of one generation have different SDE windows. Rewards would compare unequal noise."
                )
            if self._first("windows"):
                self._report(windows_problem(rollout.windows))

    def on_image_loss(
        self, args: Any, state: Any, control: Any, image_loss: ImageLoss, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if image_loss.first_pass and image_loss.objective.stochastic and self._first("velocities"):
            self._report(velocity_problem(image_loss, 0.5 if args.bf16 or args.fp16 else 0.01))
        if image_loss.regularizer is not None and self._first("regularizer"):
            # A regulariser under no_grad would be a number in the logs and nothing else.
            if not image_loss.regularizer.requires_grad:
                self._report("the regulariser has no gradient. Is the image expert trainable?")
        if state.global_step == 0 and image_loss.reference is not None and self._first("reference"):
            limit = 1e-3 if is_half(args, model) else 1e-5
            self._report(reference_problem(image_loss.velocity, image_loss.reference, limit))

    def on_update(
        self, args: Any, state: Any, control: Any, update: Update, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and update.text_kl and self._first("text KL"):
            self._report(text_kl_problem(max(update.text_kl), 0.02 if is_half(args, model) else 1e-4))


def default_checks(mode: str) -> list["TrustChecks"]:
    """The checks of a run, by its `trust_checks`."""
    return [] if mode == "off" else [TrustChecks(mode)]


def is_half(args: Any, model: nn.Module | None) -> bool:
    """Say whether a run computes in half precision, all or in part."""
    parameters = [] if model is None else model.parameters()
    return args.bf16 or args.fp16 or any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters)


def weights_problem(model: nn.Module) -> str | None:
    """Weights to train that are not in float32."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not dtypes & {torch.bfloat16, torch.float16}:
        return None
    return (
        f"weights to train are stored in {', '.join(sorted(map(str, dtypes)))}, where small updates round to nothing. "
        "Load the model in torch.float32 (bf16=True computes in bfloat16 all the same) or train adapters."
    )


def sampling_problem(config: GenerationConfig, temperature: float) -> str | None:
    """Thinkings that are sampled in another way than their log-probs are computed, at this temperature."""
    if config.do_sample and math.isclose(config.temperature, temperature):
        return None
    sampled = f"at temperature {config.temperature}" if config.do_sample else "greedily"
    return (
        f"thinkings are sampled {sampled}, but trained on at temperature {temperature}: every ratio would be biased. "
        "Set `temperature` in the configuration, and nowhere else."
    )


def windows_problem(windows: Tensor) -> str | None:
    """Processes whose windows (P, K) are not one."""
    if not (windows != windows[0]).any():
        return None
    return f"processes drew different SDE windows: {windows.tolist()}. Give all of them the same seed."


def velocity_problem(image_loss: ImageLoss, limit: float) -> str | None:
    """
    A training forward that does not see what the sampler saw, at the same weights and states.

    Args:
        limit: share of the clip range that the difference, as a log-ratio, may take on average over the steps.
    """
    trained, states, objective = image_loss.velocity, image_loss.states, image_loss.objective
    rms = (trained - states.velocity).flatten(1).double().pow(2).mean(1).sqrt()
    width = ratio_width(objective.transition(states, image_loss.rounds), objective.args.ratio_norm).to(rms)
    shares = width * rms / math.sqrt(math.prod(trained.shape[1:])) / objective.clip_range(trained)
    if shares.mean() <= limit:
        return None
    return (
        f"velocities of the rollout and of the training forward differ by {shares.mean():.1%} of the clip range, the "
        f"worst step by {shares.max():.1%} (limit of the mean {limit:.0%}). The model must compute both in the same "
        "way: check dropout, padding and the positions of images."
    )


def reference_problem(velocity: Tensor, reference: Tensor, limit: float) -> str | None:
    """
    A reference model that is not the policy before its first update.

    Args:
        velocity, reference: (S, *latent) of the two.
        limit: mean squared difference, as a share of the mean squared velocity, that rounding may make.
    """
    share = float((velocity - reference).double().square().mean() / reference.double().square().mean())
    if share <= limit:
        return None
    return (
        f"the regulariser is not 0 before the first update: velocities of the reference model differ by {share:.2g} "
        f"of their mean square (limit {limit:g}). The reference must be the model that training starts from: check "
        "what changes weights between making the trainer and training, and dropout."
    )


def text_kl_problem(kl: float, limit: float) -> str | None:
    """A text KL that is not 0 before the first update."""
    if kl <= limit:
        return None
    return (
        f"the text KL is {kl:.2g} before the first update (limit {limit:g}). The reference must be the model that "
        "training starts from: check what changes weights between making the trainer and training, and dropout."
    )


def dtype_problem(images: Sequence[Image]) -> str | None:
    """States that are not kept in float32."""
    tensors = [x for image in images for x in columns(image.steps).values() if x.ndim > 1 and len(x)]
    for low in (torch.bfloat16, torch.float16):
        rounded = bool(tensors) and all(torch.equal(x.float(), x.to(low).float()) for x in tensors)
        if rounded or any(x.dtype == low for x in tensors):
            return f"states have the precision of {low}, expected torch.float32: rounding would bias every ratio."
    return None


def noise_problem(rollout: Rollout, transition: Callable[[SDESteps], Transition]) -> str | None:
    """Noise that images of one group share, or that has not the power that the update takes it to have."""
    powers, numbers = 0.0, 0
    for first in range(0, len(rollout.trajectories), rollout.group_size):
        group = [recorded_noise(t, transition) for t in rollout.trajectories[first:][: rollout.group_size]]
        size = min(map(len, group))
        if size:
            vectors = torch.stack([noise[:size] for noise in group])
            distances = torch.cdist(vectors, vectors).square() / size  # 2 for independent noise
            if (distances + 2 * torch.eye(len(vectors)) < 0.01).any():
                return "samples of one group share their noise: their rewards can't differ. Seed each on its own."
        powers += float(sum(noise.square().sum() for noise in group))
        numbers += sum(map(len, group))
    if numbers and abs(powers / numbers - 1) > 6 * math.sqrt(2 / numbers) + 0.001:
        return (
            f"the noise of the recorded states has {powers / numbers:.3g} times the power that the update takes it to "
            "have: that biases every ratio. Sampler and update must have the same num_inference_steps, schedule, "
            "sde_type and noise_level."
        )
    return None


def recorded_noise(trajectory: Trajectory, transition: Callable[[SDESteps], Transition]) -> Tensor:
    """(n,) noise of a trajectory's steps, at most 8192 numbers each: eps = (x_next - a x - b v) / std."""
    noise = [torch.zeros(0, dtype=torch.float64)]
    for _, image in trajectory.painted():
        some = {
            name: x.flatten(1)[:, :8192].double().cpu() if x.ndim > 1 else x.cpu()
            for name, x in columns(image.steps).items()
        }
        states = SDESteps(**some)
        a, b, std = (expand_left(x, states.x) for x in transition(states))
        noise.append(((states.x_next - a * states.x - b * states.velocity) / std).flatten())
    return torch.cat(noise)
