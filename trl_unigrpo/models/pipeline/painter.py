"""Velocities out of a diffusers pipeline, by running its own `__call__` with our scheduler inside.

No family of pipelines is known here. What all have in common is a loop: for each time of the scheduler, call the
`transformer`, then `scheduler.step`. A forced run of that loop has two steps. In the first the transformer is left
out, and the scheduler puts in the state that is wanted; in the second the transformer computes the velocity there.
Signs, packing, the scaling of times and conditioning are the pipeline's own work.

Shapes: B samples, `latent` the dimensions of the state that the pipeline's loop keeps, packed or not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import signature
from math import prod
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipeline
from diffusers.guiders import BaseGuidance
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .patching import attributes
from .scheduler import HandingScheduler, OnStep


PROBE = "a picture"
# Arguments that leave guidance out; the first that do are taken. Where there is a `true_cfg_scale`, or where the
# defaults will do, `guidance_scale` is a number that the transformer is told, and stays.
WITHOUT_GUIDANCE: tuple[dict[str, float], ...] = (
    {"true_cfg_scale": 1.0},
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 0.0},
)
ONE_IMAGE = {"use_resolution_binning": False, "num_frames": 1}
"""What a call is told where it takes it: the size asked for, and an image rather than a video."""

PIXELS_AT_ONCE = 2**20
"""How much of a batch is decoded together: VAEs need far more memory for a pixel than transformers."""

PROBE_SIDES = (8, 16, 32)
"""Sides of the smallest image, in latents, that a pipeline is tried with."""


class _Stop(BaseException):
    """Ends a run of a pipeline where there is nothing more to learn from it. No error: nobody need log it."""


class ReplayError(RuntimeError):
    """A pipeline did something else than before with the same state."""


@dataclass
class Encodings:
    """
    Prompts, and what the pipeline's text encoders make of them: encoded when first needed, once for any number of
    velocities.

    Attributes:
        grad: whether they are encoded with a gradient.
        outputs: what the encoders returned, call by call.
        subsets: encodings of some of the prompts, by their indices.
        checked: whether the pipeline has seen the prompts.
    """

    prompts: Sequence[str]
    grad: bool = False
    outputs: list[Any] = field(default_factory=list)
    subsets: dict[tuple[int, ...], "Encodings"] = field(default_factory=dict)
    checked: bool = False

    def subset(self, rows: Sequence[int]) -> "Encodings":
        """Encodings of some of the prompts."""
        prompts = [self.prompts[row] for row in rows]
        return self.subsets.setdefault(tuple(rows), Encodings(prompts, self.grad))


class Painter:
    """
    Runs a flow-matching text-to-image pipeline step by step, without guidance.

    Args:
        pipeline: a `DiffusionPipeline` or `ModularPipeline`. It is as it was after each run.
        arguments: further arguments of its call, such as `max_sequence_length`.

    Attributes:
        batches: whether the pipeline takes several prompts at once.
        mixes_prompts: whether these may be different ones.

    Raises:
        ValueError: if the pipeline can't run, or not without guidance; with the reason.
    """

    def __init__(self, pipeline: Any, arguments: dict[str, Any] | None = None):
        self.pipeline = pipeline
        self.scheduler = HandingScheduler.like(pipeline.scheduler)
        self.modular = isinstance(pipeline, ModularPipeline)
        if self.modular:
            self.accepted = {parameter.name for parameter in pipeline.blocks.inputs}
        else:
            self.accepted = set(signature(type(pipeline).__call__).parameters)
        self.arguments = {**ONE_IMAGE, **(arguments or {})}
        self.batches, self.mixes_prompts = True, True
        self._output: Any = None  # of the transformer, in the dry run
        self._density = 0.0  # latent numbers per pixel
        self._probe_size = (0, 0)  # an image size that it can paint
        self._told: dict[tuple[int, int], tuple[np.ndarray, np.ndarray] | None] = {}
        self._mixes_times: bool | None = None
        self._idle = Encodings([])
        self._dry_run()

    @property
    def denoiser(self) -> Any:
        """The network that is trained."""
        return self.pipeline.transformer

    @property
    def name(self) -> str:
        return type(self.pipeline).__name__

    # What a pipeline can do

    def _dry_run(self) -> None:
        """
        Find the arguments with which one step of two images is one forward of two rows, or of one image, for
        pipelines that only paint one at a time.
        """
        seen: list[str] = []
        own, failed = self.arguments, None
        for off in WITHOUT_GUIDANCE:
            if not off.keys() <= self.accepted:
                continue
            self.arguments = {**own, **off}
            for side in PROBE_SIDES:
                side *= getattr(self.pipeline, "vae_scale_factor", 8)
                try:
                    rows = self._count_rows((side, side))
                except Exception as error:  # whatever a pipeline raises: of the size, or of guidance for a batch
                    failed = error
                    continue
                if rows == [2] or (len(rows) == 1 and not self.batches):
                    self._probe_size = (side, side)
                    self.mixes_prompts = self.batches and self._keeps_prompts_apart()
                    return
                seen.append(f"{off or 'its defaults'}: {rows}")
                break
        if not seen:
            raise ValueError(f"{self.name} fails in a dry run: {failed}") from failed
        raise ValueError(
            f"{self.name} always guides: a step of 2 images should be one forward of its transformer with 2 rows, but "
            f"was, with {'; with '.join(seen)} rows. Guided sampling can't be trained here: take another pipeline."
        )

    @torch.no_grad()
    def _count_rows(self, image_size: tuple[int, int]) -> list[int]:
        rows: list[int] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            called = signature(type(self.denoiser).forward).bind(self.denoiser, *args, **kwargs).arguments.values()
            rows.append(len(next(x for x in called if isinstance(x, (Tensor, list)))))  # the latents come first
            self._output = self._forward(*args, **kwargs)
            return self._output

        def on_step(_: Tensor, sample: Tensor) -> Tensor:
            self.batches = len(sample) == 2
            self._density = sample[0].numel() / prod(image_size)
            raise _Stop

        self._run(Encodings([PROBE] * 2), image_size, torch.ones(1), on_step, forward)
        return rows

    @torch.no_grad()
    def _keeps_prompts_apart(self) -> bool:
        """Whether an image is the same beside one of a longer prompt: some encoders let it see the padding."""
        size, time = self._probe_size, torch.full((2,), 0.5)
        start = self.start(2, size).to(self.denoiser.device)
        pairs = [Encodings([PROBE, PROBE]), Encodings([PROBE, f"{PROBE} of " + "many " * 16 + "things"])]
        alike, mixed = (self._velocity(pair, start, time, size)[0] for pair in pairs)
        return self._same(alike, mixed)

    @torch.no_grad()
    def _tells_rows_their_times(self, image_size: tuple[int, int]) -> bool:
        """Whether each row of a forward may have a time of its own."""
        pair, start = Encodings([PROBE, PROBE]), self.start(2, image_size)
        times = torch.tensor([0.3, 0.8], device=start.device)
        try:
            together = self._velocity(pair, start, times, image_size)
        except (RuntimeError, ValueError, TypeError):
            return False
        alone = torch.stack([self._velocity(pair, start, times[[i, i]], image_size)[i] for i in range(2)])
        return self._same(together, alone)

    def _same(self, a: Tensor, b: Tensor) -> bool:
        """Whether two velocities differ by rounding alone."""
        limit = 1e-4 if self.denoiser.dtype == torch.float32 else 0.05
        return bool((a - b).norm() <= limit * b.norm())

    def _times_told(self, times: Tensor, image_size: tuple[int, int]) -> Tensor:
        """
        What the transformer is told at flow times. Most often that is 1000 t, but a pipeline may shift the one and
        not the other: its own schedule of many steps says what belongs together.
        """
        full = self.scheduler.config.num_train_timesteps
        if image_size not in self._told:
            self._run(self._idle_encodings(1), image_size, None, _stop, _stop, steps=1000)
            sigmas = self.scheduler.sigmas[:-1].double().cpu().numpy()
            told = self.scheduler.timesteps.double().cpu().numpy()
            same = np.abs(told - full * sigmas).max() < 1e-3 * full
            self._told[image_size] = None if same else (np.append(sigmas, 0.0)[::-1], np.append(told, 0.0)[::-1])
        table = self._told[image_size]
        if table is None:
            return times.float() * full
        return torch.from_numpy(np.interp(times.double().cpu().numpy(), *table)).float()

    def own_times(self, num_inference_steps: int, image_size: tuple[int, int]) -> Tensor:
        """(num_inference_steps + 1,) flow times, float64, of the pipeline's own schedule for an image size."""
        self._run(self._idle_encodings(1), image_size, None, _stop, _stop, steps=num_inference_steps)
        return self.scheduler.sigmas.double().cpu()

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """
        Shape of one image's state.

        Raises:
            ValueError: for a size that the pipeline can't paint, or would round.
        """
        problem = ""
        try:
            shape = tuple(self.start(1, image_size).shape[1:])
        except ValueError as error:
            shape, problem = (), f": {error}"
        if round(self._density * prod(image_size)) != prod(shape):
            raise ValueError(
                f"{self.name} can't paint an image of {image_size[0]} x {image_size[1]} pixels (height x width)"
                f"{problem}. Take sides that are multiples of 64, or of what its documentation names."
            )
        return shape

    # Runs

    def velocity(self, encodings: Encodings, latents: Tensor, times: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Velocity (B, *latent), float32, at states (B, *latent) and times (B,)."""
        if len(times.unique()) > 1 and self._mixes_times is None:
            self._mixes_times = self._tells_rows_their_times(image_size)
        groups: dict[Any, list[int]] = {}
        for row, (prompt, time) in enumerate(zip(encodings.prompts, times.tolist(), strict=True)):
            alike = ("" if self.mixes_prompts else prompt, 0.0 if self._mixes_times else time)
            groups.setdefault(alike if self.batches else row, []).append(row)
        if len(groups) == 1:
            return self._velocity(encodings, latents, times, image_size)
        velocity = torch.zeros_like(latents)
        for rows in groups.values():
            index = torch.tensor(rows, device=latents.device)
            part = self._velocity(encodings.subset(rows), latents[index], times[index], image_size)
            velocity = velocity.index_copy(0, index, part)
        return velocity

    def _velocity(self, encodings: Encodings, latents: Tensor, times: Tensor, image_size: tuple[int, int]) -> Tensor:
        """One forward."""
        found: list[Tensor] = []
        forced = False
        if len(times.unique()) == 1:
            times = times[0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs) if forced else self._nothing()

        def on_step(velocity: Tensor, sample: Tensor) -> Tensor:
            nonlocal forced
            if not forced:
                forced = True
                return latents
            if not torch.equal(sample, latents):
                raise ReplayError(
                    f"{self.name} changed the latents between two steps, so that the recorded ones can't be replayed. "
                    "Please report it, with the version of diffusers; until then take another pipeline."
                )
            found.append(velocity)
            raise _Stop

        self._run(encodings, image_size, torch.stack([times, times]), on_step, forward)
        return found[0].float()

    @torch.no_grad()
    def start(
        self, batch_size: int, image_size: tuple[int, int], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """The noise (B, *latent), float32, that the pipeline starts from, one generator for each image."""
        if not self.batches and batch_size > 1:
            each = [[generator] for generator in generators] if generators else [None] * batch_size
            return torch.cat([self.start(1, image_size, one) for one in each])
        found: list[Tensor] = []

        def on_step(_: Tensor, sample: Tensor) -> Tensor:
            found.append(sample.float())
            raise _Stop

        idle = self._idle_encodings(batch_size)
        self._run(idle, image_size, torch.ones(1), on_step, self._nothing, generators)
        return found[0]

    def decode(self, latents: Tensor, image_size: tuple[int, int], output_type: str, rounds: bool = True) -> Any:
        """
        Images of final states (B, *latent), as the pipeline's `output_type` has them, a few at a time.

        Args:
            rounds: to the transformer's precision, as stock schedulers do.
        """
        fits = max(1, PIXELS_AT_ONCE // prod(image_size)) if self.batches else 1
        if len(latents) > fits:
            parts = [self.decode(some, image_size, output_type, rounds) for some in latents.split(fits)]
            return torch.cat(parts) if output_type == "pt" else [image for part in parts for image in part]
        grad = torch.is_grad_enabled()

        def on_step(velocity: Tensor, _: Tensor) -> Tensor:
            torch.set_grad_enabled(grad)
            return latents.to(velocity.dtype) if rounds else latents

        idle = self._idle_encodings(len(latents))
        out = self._run(idle, image_size, torch.ones(1), on_step, self._nothing, output_type=output_type)
        if self.modular:
            return out
        return out[0] if isinstance(out, tuple) else next(iter(out.values()))

    @torch.no_grad()
    def vae_input(self, latents: Tensor, image_size: tuple[int, int]) -> Tensor:
        """
        What the VAE would get to decode.

        Raises:
            ValueError: if the pipeline has no VAE.
        """
        vae, found = getattr(self.pipeline, "vae", None), []
        if vae is None:
            raise ValueError(f"{self.name} has no `vae`: it has no latents to encode images to.")

        def decode(handed: Tensor, *_: Any, **__: Any) -> Any:
            found.append(handed)
            raise _Stop

        with attributes(vae, decode=decode):
            self.decode(latents.to(self.denoiser.device), image_size, "pt", rounds=False)
        return found[0]

    def _idle_encodings(self, batch_size: int) -> Encodings:
        """Something for the text encoders to have returned where nobody looks at it."""
        if len(self._idle.prompts) != batch_size:
            self._idle = Encodings([PROBE] * batch_size)  # filled by the first run
        return self._idle

    def _run(
        self,
        encodings: Encodings,
        image_size: tuple[int, int],
        times: Tensor | None,
        on_step: OnStep,
        forward: Callable[..., Any],
        generators: Any = None,
        output_type: str = "latent",
        steps: int = 0,
    ) -> Any:
        """
        Call the pipeline; returns what it returns, nothing if it was stopped.

        Args:
            encodings: their outputs are used if there are any, else kept.
            times: (steps,) or (steps, B) flow times to go through; None for the pipeline's own schedule of `steps`.
            on_step: in place of the scheduler's step.
            forward: in place of the transformer's, with a gradient where that is enabled now.
            generators: of the first noise; if None it does not matter.
        """
        grad, device = torch.is_grad_enabled(), self.denoiser.device
        given = None if times is None else (times, self._times_told(times, image_size))
        self.scheduler.follow(given, on_step)
        arguments = {
            **self.arguments,
            # A copy: some pipelines write into it.
            "prompt": list(encodings.prompts) if self.batches else encodings.prompts[0],
            "height": image_size[0],
            "width": image_size[1],
            "num_inference_steps": steps or len(times),  # type: ignore[arg-type]
            "generator": generators or torch.Generator(device).manual_seed(0),
            "output_type": output_type,
        }
        arguments = {name: value for name, value in arguments.items() if name in self.accepted}
        if self.modular:
            arguments["output"] = "images"
        if "enable_safety_check" in self.accepted and encodings.checked and output_type == "latent":
            arguments["enable_safety_check"] = False  # the prompts were checked the first time, and no image comes out
        encodings.checked = True

        def forward_with_grad(*args: Any, **kwargs: Any) -> Any:
            torch.set_grad_enabled(grad)  # until the pipeline's own `no_grad` ends
            return forward(*args, **kwargs)

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(attributes(self.pipeline, scheduler=self.scheduler))
            stack.enter_context(attributes(self.denoiser, forward=forward_with_grad))
            for guider in self._components(BaseGuidance):
                stack.enter_context(attributes(guider, _enabled=False))
            for looping in _with_progress_bars(self.pipeline):
                stack.enter_context(attributes(looping, _progress_bar_config={"disable": True}))
            self._remember(stack, encodings)
            try:
                return self.pipeline(**arguments)
            except _Stop:
                return {"": None}

    def _remember(self, stack: ExitStack, encodings: Encodings) -> None:
        """Let text encoders return what they returned before, or keep what they return now."""
        known, replies = bool(encodings.outputs), iter(list(encodings.outputs))

        def remembering(encode: Callable[..., Any]) -> Callable[..., Any]:
            def remembered(*args: Any, **kwargs: Any) -> Any:
                if not known:
                    torch.set_grad_enabled(encodings.grad)
                    encodings.outputs.append(encode(*args, **kwargs))
                    torch.set_grad_enabled(False)
                output = next(replies) if known else encodings.outputs[-1]
                return tree_map(lambda x: x, output)  # lists of its own: some pipelines write into them

            return remembered

        if hasattr(self.pipeline, "encode_prompt"):
            encode = remembering(self.pipeline.encode_prompt)
            stack.enter_context(attributes(self.pipeline, encode_prompt=encode))
            return
        for encoder in self._components(nn.Module):
            if encoder not in (self.denoiser, getattr(self.pipeline, "vae", None)):
                stack.enter_context(attributes(encoder, forward=remembering(encoder.forward)))

    def _components(self, kind: type) -> list[Any]:
        return [component for component in self.pipeline.components.values() if isinstance(component, kind)]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's own forward. States are float32, it computes in its own precision."""
        dtype = self.denoiser.dtype
        args, kwargs = _cast((args, kwargs), torch.float32, dtype)
        return _cast(type(self.denoiser).forward(self.denoiser, *args, **kwargs), dtype, torch.float32)

    def _nothing(self, *args: Any, **kwargs: Any) -> Any:
        """A zero in the structure of what the transformer returns, of sizes that fit any: nobody looks at it."""
        zero = torch.zeros((), dtype=self.denoiser.dtype, device=self.denoiser.device)
        return tree_map(lambda x: zero.expand([1] * x.ndim) if isinstance(x, Tensor) else x, self._output)


def _with_progress_bars(pipeline: Any) -> Iterator[Any]:
    """The pipeline, or those blocks of a modular one, that may show a progress bar."""
    if hasattr(pipeline, "set_progress_bar_config"):
        yield pipeline
    blocks = getattr(pipeline, "_blocks", pipeline)
    for block in getattr(blocks, "sub_blocks", {}).values():
        yield from _with_progress_bars(block)


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise _Stop


def _cast(tree: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """The same, with its tensors of one dtype in another."""
    if source == target:
        return tree
    return tree_map(lambda x: x.to(target) if isinstance(x, Tensor) and x.dtype == source else x, tree)
