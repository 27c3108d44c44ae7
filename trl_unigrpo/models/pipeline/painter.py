"""Velocities out of a diffusers pipeline, by running its own `__call__` with our scheduler inside.

No family of pipelines is known here. What all have in common is a loop: for each time of the scheduler, call the
`transformer`, then `scheduler.step`. A forced run of that loop has two steps. In the first the transformer is left
out, and the scheduler puts in the state that is wanted; in the second the transformer computes the velocity there.
Signs, packing, the scaling of times and conditioning are the pipeline's own work.

Shapes: B samples, `latent` the dimensions of the state that the pipeline's loop keeps, packed or not.
"""

from collections.abc import Sequence
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor

from .encodings import Encodings
from .loop import PROBE, PipelineLoop, Stop
from .patching import attributes


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
        mixes_prompts: whether prompts of one run may be different ones, where it takes several.

    Raises:
        ValueError: if the pipeline can't run, or not without guidance; with the reason.
    """

    def __init__(self, pipeline: Any, arguments: dict[str, Any] | None = None):
        self.loop = PipelineLoop(pipeline, arguments)
        self.mixes_prompts = True
        self._density = 0.0  # latent numbers per pixel
        self._probe_size = (0, 0)  # an image size that it can paint
        self._mixes_times: bool | None = None
        self._dry_run()

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
        """Count the rows of each forward in one step of two images, and learn the size of their states."""
        rows: list[int] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            denoiser = self.loop.denoiser
            called = signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments.values()
            rows.append(len(next(x for x in called if isinstance(x, (Tensor, list)))))  # the latents come first
            self.loop.sample_output = self.loop.forward(*args, **kwargs)
            return self.loop.sample_output

        def on_step(_: Tensor, sample: Tensor) -> Tensor:
            self.loop.batches = len(sample) == 2
            self._density = sample[0].numel() / prod(image_size)
            raise Stop

        self.loop.run(Encodings([PROBE] * 2), image_size, torch.ones(1), on_step, forward)
        return rows

    @torch.no_grad()
    def _keeps_prompts_apart(self) -> bool:
        """Try whether an image is the same beside one of a longer prompt: some encoders let it see the padding."""
        size, time = self._probe_size, torch.full((2,), 0.5)
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
        """Compute the velocity (B, *latent), float32, at states (B, *latent) and times (B,)."""
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
        """Compute velocities that one forward can compute."""
        found: list[Tensor] = []
        forced = False
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
        Decode images of final states (B, *latent), as the pipeline's `output_type` has them, a few at a time.

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
        out = self.loop.run(idle, image_size, torch.ones(1), on_step, self.loop.nothing, output_type=output_type)
        if self.loop.modular:
            return out
        return out[0] if isinstance(out, tuple) else next(iter(out.values()))

    @torch.no_grad()
    def vae_input(self, latents: Tensor, image_size: tuple[int, int]) -> Tensor:
        """
        Catch what the VAE would get to decode.

        Raises:
            ValueError: if the pipeline has no VAE.
        """
        vae, found = getattr(self.pipeline, "vae", None), []
        if vae is None:
            raise ValueError(f"{self.name} has no `vae`: it has no latents to encode images to.")

        def decode(handed: Tensor, *_: Any, **__: Any) -> Any:
            found.append(handed)
            raise Stop

        with attributes(vae, decode=decode):
            self.decode(latents.to(self.loop.denoiser.device), image_size, "pt", rounds=False)
        return found[0]
