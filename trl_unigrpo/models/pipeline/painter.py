"""Velocities out of a diffusers pipeline, by running its own `__call__` with our scheduler inside.

No family of pipelines is known here. What all have in common is a loop: for each time of the scheduler, call the
`transformer`, then `scheduler.step`. A forced run of that loop has two steps. In the first the transformer is left
out, and the scheduler puts in the state that is wanted; in the second the transformer computes the velocity there.
Signs, packing, the scaling of times and conditioning are the pipeline's own work.

Shapes: B samples, `latent` the dimensions of the state that the pipeline's loop keeps, packed or not.
"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...images import mark_failed
from ..patching import attributes
from .encodings import Encodings
from .loop import PROBE, PipelineLoop, Stop, stop
from .reading import cut_off, noted_numbers


# Arguments that leave guidance out; the first that do are taken. Where there is a `true_cfg_scale`, or where the
# defaults will do, `guidance_scale` is a number that the transformer is told, and stays.
WITHOUT_GUIDANCE: tuple[dict[str, float], ...] = (
    {"true_cfg_scale": 1.0},
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 0.0},
)
PIXELS_AT_ONCE = 2**20
"""Pixels of a batch that are decoded together: VAEs need far more memory for a pixel than transformers."""

PROBE_SIDES = (8, 16, 32)
"""Sides of the smallest image, in latents, that a pipeline is tried with."""


class ReplayError(RuntimeError):
    """A pipeline did something else than before with the same state."""


class Painter:
    """
    Runs a flow-matching text-to-image pipeline step by step, without guidance.

    Args:
        pipeline: a `DiffusionPipeline` or `ModularPipeline`. It is as it was after each run.
        arguments: further arguments of its call, such as `max_sequence_length`.

    Attributes:
        loop: of the pipeline, with the arguments that leave guidance out.
        probe_size: (height, width) of an image that the pipeline can paint.
        mixes_prompts: whether prompts of one run may be different ones, where it takes several.

    Raises:
        ValueError: if the pipeline can't run, or not without guidance; with the reason.
    """

    def __init__(self, pipeline: Any, arguments: dict[str, Any] | None = None):
        self.loop = PipelineLoop(pipeline, arguments)
        self.mixes_prompts = True
        self._enlarges = 0  # pixels beside each other for one of the VAE's latents; 0 where that has nothing to decode
        self.probe_size = (0, 0)
        self._shapes: dict[tuple[int, int], tuple[int, ...]] = {}
        self._mixes_times: bool | None = None
        self._has_warned = False
        own = self.loop.arguments
        try:
            self._dry_run()
        except ValueError as error:
            self.loop.arguments, self.loop.stand_in = own, True  # some don't run without an image to edit
            with suppress(ValueError):
                if self.loop.edits:
                    self._dry_run()
                    return
            raise error

    @property
    def pipeline(self) -> Any:
        return self.loop.pipeline

    @property
    def name(self) -> str:
        return self.loop.name

    @property
    def batches(self) -> bool:
        """True where the pipeline takes several prompts at once."""
        return self.loop.batches

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call beside the prompt, of those that it takes; they leave guidance out."""
        return {name: value for name, value in self.loop.arguments.items() if name in self.loop.accepted}

    # Abilities, found by trying

    def _dry_run(self) -> None:
        """
        Find the arguments with which one step of two images is one forward of two rows, or of one image, for
        pipelines that only paint one at a time.
        """
        seen: list[str] = []
        own, failed = self.loop.arguments, None
        for off in WITHOUT_GUIDANCE:
            if not off.keys() <= self.loop.accepted:
                continue
            self.loop.arguments = {**own, **off}
            for side in PROBE_SIDES:
                side *= getattr(self.pipeline, "vae_scale_factor", 8)
                try:
                    rows = self._count_rows((side, side))
                except Exception as error:  # whatever a pipeline raises: of the size, or of guidance for a batch
                    failed = error
                    continue
                if rows == [2] or (len(rows) == 1 and not self.batches):
                    self._check_times((side, side))
                    self._check_network((side, side))
                    self.probe_size = self._try_decoding((side, side))
                    self.mixes_prompts = self.batches and self._keeps_prompts_apart()
                    return
                seen.append(f"{off or 'its defaults'}: {rows}")
                break
        if not seen:
            missing = isinstance(failed, (ImportError, NameError))
            hint = ". It seems to need a package that is not installed, torchvision most often" if missing else ""
            raise ValueError(f"{self.name} fails in a dry run: {failed}{hint}") from failed
        raise ValueError(
            f"{self.name} always guides: a step of 2 images should be one forward of its transformer with 2 rows, but "
            f"was, with {'; with '.join(seen)} rows. Guided sampling can't be trained here: take another pipeline."
        )

    @torch.no_grad()
    def _count_rows(self, image_size: tuple[int, int]) -> list[int]:
        """Count the rows of each forward in one step of two images."""
        rows: list[int] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            denoiser = self.loop.denoiser
            called = signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments.values()
            rows.append(len(next(x for x in called if isinstance(x, (Tensor, list)))))  # the latents come first
            self.loop.sample_output = self.loop.forward(*args, **kwargs)
            return self.loop.sample_output

        def on_step(_: Tensor, sample: Tensor) -> Tensor:
            self.loop.batches = len(sample) == 2
            raise Stop

        self.loop.run(Encodings([PROBE] * 2), image_size, torch.ones(1), on_step, forward)
        return rows

    @torch.no_grad()
    def _try_decoding(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """
        Decode one image that was asked for in some size; returns its own.

        Raises:
            ValueError: if the outcome is not one image.
        """
        latents = self.start(1, image_size)
        try:
            pixels = self.decode(latents, image_size, "pt")
        except Exception as error:  # whatever a pipeline raises
            raise ValueError(f"{self.name} fails in a dry run, where it decodes an image: {error}") from error
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
            found = f"a tensor {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else f"a {type(pixels).__name__}"
            raise ValueError(
                f"{self.name} should give an image (1, 3, height, width), but gives {found}. Take a pipeline that "
                "paints images, or a video pipeline that can be asked for a single frame."
            )
        handed = self._handed_to_vae(latents, image_size)
        if handed is not None:
            ratios = {side / own for side, own in zip(pixels.shape[-2:], handed.shape[-2:], strict=True)}
            self._enlarges = int(min(ratios)) if len(ratios) == 1 else 0
        return pixels.shape[-2], pixels.shape[-1]

    def _check_times(self, image_size: tuple[int, int]) -> None:
        """Raise ValueError for a schedule that is not a flow's: other states belong to its times."""
        times = self.own_times(10, image_size)
        if not (0.5 < times[0] <= 1.001 and times[-1] < times[0]):
            raise ValueError(
                f"The schedule of {self.name} goes from {times[0]:.3g} to {times[-1]:.3g}, and not from 1, which is "
                "noise, down to 0: its states are not on a line between the two. Take another pipeline."
            )

    @torch.no_grad()
    def _check_network(self, image_size: tuple[int, int]) -> None:
        """Raise ValueError where another network than the transformer paints early or late steps."""
        for time in (1.0, 0.02):
            called = False

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal called
                called = True
                return self.loop.nothing()

            self.loop.run(self.loop.idle_encodings(1), image_size, torch.full((1,), time), stop, forward)
            if not called:
                raise ValueError(
                    f"{self.name} leaves its steps at times near {time:.0f} to another network than its "
                    "`transformer`, which would not be trained. Take a pipeline with one."
                )

    @torch.no_grad()
    def _keeps_prompts_apart(self) -> bool:
        """Try whether an image is the same beside one of a longer prompt: some encoders let it see the padding."""
        size, time = self.probe_size, torch.full((2,), 0.5)
        start = self.start(2, size).to(self.loop.denoiser.device)
        pairs = [Encodings([PROBE, PROBE]), Encodings([PROBE, f"{PROBE} of " + "many " * 16 + "things"])]
        alike, mixed = (self._velocity(pair, start, time, size)[0] for pair in pairs)
        return self._same(alike, mixed)

    @torch.no_grad()
    def _tells_rows_their_times(self, image_size: tuple[int, int]) -> bool:
        """Try whether each row of a forward may have a time of its own."""
        pair, start = Encodings([PROBE, PROBE]), self.start(2, image_size)
        times = torch.tensor([0.3, 0.8], device=start.device)
        try:
            together = self._velocity(pair, start, times, image_size)
        except (RuntimeError, ValueError, TypeError):
            return False
        alone = torch.stack([self._velocity(pair, start, times[[i, i]], image_size)[i] for i in range(2)])
        return self._same(together, alone)

    def _same(self, a: Tensor, b: Tensor) -> bool:
        """Say whether two velocities differ by rounding alone."""
        limit = 1e-4 if self.loop.denoiser.dtype == torch.float32 else 0.05
        return bool((a - b).norm() <= limit * b.norm())

    def own_times(self, num_inference_steps: int, image_size: tuple[int, int]) -> Tensor:
        """Return the pipeline's own flow times (num_inference_steps + 1,), float64, for an image size."""
        return self.loop.own_schedule(num_inference_steps, image_size)[0]

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """
        Find the shape of one image's state.

        Raises:
            ValueError: for a size that the pipeline can't paint, or makes another of.
        """
        if image_size not in self._shapes:
            problem, painted = "", image_size
            try:
                latents = self.start(1, image_size)
                painted = self._painted_size(latents, image_size)
            except (RuntimeError, ValueError) as error:
                problem = f": {error}"
            if painted != image_size:
                problem = f": asked for it, it paints {painted[0]} x {painted[1]}"
            if problem:
                raise ValueError(
                    f"{self.name} can't paint an image of {image_size[0]} x {image_size[1]} pixels (height x width)"
                    f"{problem}. Take sides that are multiples of 64, or of what its documentation names."
                )
            self._shapes[image_size] = tuple(latents.shape[1:])
        return self._shapes[image_size]

    @torch.no_grad()
    def _painted_size(self, latents: Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
        """Find the size of what is painted for a size: a pipeline may round it, or have an area of its own."""
        if not self._enlarges:
            pixels = self.decode(latents, image_size, "pt")
            return pixels.shape[-2], pixels.shape[-1]
        handed = self.vae_input(latents, image_size)
        return handed.shape[-2] * self._enlarges, handed.shape[-1] * self._enlarges

    # Runs

    def velocity(self, encodings: Encodings, latents: Tensor, times: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Compute the velocity (B, *latent), float32, at states (B, *latent) and times (B,)."""
        if len(times.unique()) > 1 and self._mixes_times is None:
            self._mixes_times = self._tells_rows_their_times(image_size)
        groups: dict[Any, list[int]] = {}
        for row, (prompt, time) in enumerate(zip(encodings.prompts, times.tolist(), strict=True)):
            own = "" if self.mixes_prompts else prompt, 0.0 if self._mixes_times else time
            alike = (*own, *encodings.source(row))
            groups.setdefault(alike if self.batches else row, []).append(row)
        if len(groups) == 1:
            velocity = self._velocity(encodings, latents, times, image_size)
            self._warn_of_long_prompts([encodings])
            return velocity
        velocity = torch.zeros_like(latents)
        for rows in groups.values():
            index = torch.tensor(rows, device=latents.device)
            part = self._velocity(encodings.subset(rows), latents[index], times[index], image_size)
            velocity = velocity.index_copy(0, index, part)
        self._warn_of_long_prompts([encodings.subset(rows) for rows in groups.values()])
        return velocity

    def _warn_of_long_prompts(self, encoded: Sequence[Encodings]) -> None:
        """Warn, once, of prompts whose end was cut off."""
        if self._has_warned:
            return
        tokenizers = self.loop.tokenizers
        found = []
        for part in (part for part in encoded if part.tokens):
            found += cut_off(part.prompts, part.tokens, part.outputs, tokenizers)
            part.tokens.clear()  # looked at once
        if not found:
            return
        self._has_warned = True
        prompt, length, read = max(found, key=lambda cut: cut[1])
        warnings.warn(
            f"{self.name} cuts off the end of {len(found)} prompts of this batch: of one of {length} tokens it reads "
            f"about {read}, and not {prompt[-40:]!r}. What a thinker writes there is trained, but never seen. Raise "
            "painter_arguments={'max_sequence_length': ...} where the pipeline takes it, or have shorter answers by "
            "the system_prompt or max_completion_length. Said once."
        )

    def _velocity(self, encodings: Encodings, latents: Tensor, times: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Compute velocities that one forward can compute."""
        found: list[Tensor] = []
        forced = False
        latents = latents.contiguous()  # kernels round by the layout, too, and a recorded state has lost its own
        if len(times.unique()) == 1:
            times = times[0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.loop.forward(*args, **kwargs) if forced else self.loop.nothing()

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
            raise Stop

        self.loop.run(encodings, image_size, torch.stack([times, times]), on_step, forward)
        return found[0].float()

    def probe(self, sources: Sequence[Tensor] = ()) -> Tensor:
        """Compute some velocity at the smallest size, of an edit of source images: the same each time."""
        size, encodings = self.probe_size, Encodings([PROBE], sources=[sources] if sources else ())
        noise = self.start(1, size).to(self.loop.denoiser.device)
        return self._velocity(encodings, noise, torch.full((1,), 0.5), size)

    @torch.no_grad()
    def start(
        self, batch_size: int, image_size: tuple[int, int], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Draw the noise (B, *latent), float32, that the pipeline starts from, one generator for each image."""
        if not self.batches and batch_size > 1:
            each = [[generator] for generator in generators] if generators else [None] * batch_size
            return torch.cat([self.start(1, image_size, one) for one in each])
        found: list[Tensor] = []

        def on_step(_: Tensor, sample: Tensor) -> Tensor:
            found.append(sample.float())
            raise Stop

        idle = self.loop.idle_encodings(batch_size)
        self.loop.run(idle, image_size, torch.ones(1), on_step, self.loop.nothing, generators=generators)
        return found[0]

    def decode(self, latents: Tensor, image_size: tuple[int, int], output_type: str, rounds: bool = True) -> Any:
        """
        Decode images of final states (B, *latent), as the pipeline's `output_type` has them, a few at a time. PIL
        images that are not numbers are marked.

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

        idle = self.loop.idle_encodings(len(latents))
        with noted_numbers(getattr(self.pipeline, "vae", None)) as finite:
            out = self.loop.run(idle, image_size, torch.ones(1), on_step, self.loop.nothing, output_type=output_type)
        if not self.loop.modular:
            out = out[0] if isinstance(out, tuple) else next(iter(out.values()))
        images = single_frames(out)
        return mark_failed(images, finite) if output_type == "pil" and len(finite) == len(images) else images

    def vae_input(self, latents: Tensor, image_size: tuple[int, int]) -> Tensor:
        """
        Catch what the VAE would get to decode.

        Raises:
            ValueError: if the pipeline has no VAE.
        """
        handed = self._handed_to_vae(latents, image_size)
        if handed is None:
            raise ValueError(f"{self.name} has no `vae`: it has no latents to encode images to.")
        return handed

    @torch.no_grad()
    def _handed_to_vae(self, latents: Tensor, image_size: tuple[int, int]) -> Tensor | None:
        """Catch what the VAE would get to decode; None where there is none."""
        vae, found = getattr(self.pipeline, "vae", None), []
        if vae is None:
            return None

        def decode(handed: Tensor, *_: Any, **__: Any) -> Any:
            found.append(handed)
            raise Stop

        with attributes(vae, decode=decode):
            self.decode(latents.to(self.loop.denoiser.device), image_size, "pt", rounds=False)
        return found[0] if found else None


def single_frames(out: Any) -> Any:
    """Take the images out of videos of one frame; images stay as they are."""
    if isinstance(out, list) and all(isinstance(video, list) and len(video) == 1 for video in out):
        return [frame for (frame,) in out]
    if isinstance(out, Tensor) and out.ndim == 5 and out.shape[1] == 1:
        return out[:, 0]
    return out
