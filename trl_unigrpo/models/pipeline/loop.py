"""A pipeline's own denoising loop, run with a scheduler and a forward of our choice inside."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipeline
from diffusers.guiders import BaseGuidance
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map
from transformers import PreTrainedTokenizerBase

from ..patching import attributes
from .encodings import Encodings, remembered_encodings
from .scheduler import HandingScheduler, OnStep


PROBE = "a picture"
"""The prompt of runs that nobody looks at."""

AS_ASKED = {
    "use_resolution_binning": False,
    "_auto_resize": False,
    "num_frames": 1,
    "enable_prompt_rewrite": False,
    "use_pe": False,
}
"""Arguments of every call that takes them: the sizes and the prompt asked for, and an image rather than a video."""


class Stop(BaseException):
    """Ends a run of a pipeline where there is nothing more to learn from it. No error: nobody need log it."""


def stop(*args: Any, **kwargs: Any) -> Any:
    """End the run, whatever a pipeline calls."""
    raise Stop


class PipelineLoop:
    """
    Calls a pipeline with its scheduler, and the forward of its transformer, replaced for the time of the call.

    Args:
        pipeline: a `DiffusionPipeline` or `ModularPipeline`. It is as it was after each run.
        arguments: further arguments of its call, such as `max_sequence_length`.

    Attributes:
        scheduler: what is put in is inside of it; that holds the times of the last run.
        accepted: names of the arguments that the call takes.
        batches: whether the pipeline takes several prompts at once.
        stand_in: whether runs without a source image are shown a plain one, as the pipeline does not run without.
        sample_output: some output of the transformer, whose structure [`nothing`] has; to be set before that is used.
    """

    def __init__(self, pipeline: Any, arguments: dict[str, Any] | None = None):
        self.pipeline = pipeline
        self.scheduler = HandingScheduler(pipeline.scheduler)
        self.modular = isinstance(pipeline, ModularPipeline)
        if self.modular:
            self.accepted = {parameter.name for parameter in pipeline.blocks.inputs}
        else:
            self.accepted = set(signature(type(pipeline).__call__).parameters)
        self.arguments = {**AS_ASKED, **(arguments or {})}
        self.batches = True
        self.stand_in = False
        self.sample_output: Any = None
        self._told: dict[tuple[int, int], tuple[np.ndarray, np.ndarray] | None] = {}
        self._idle = Encodings([])

    @property
    def edits(self) -> bool:
        """True where the call takes an image to edit; with a `strength`, it would begin at that image's latents."""
        return "image" in self.accepted and "strength" not in self.accepted

    @property
    def denoiser(self) -> Any:
        """The network that is trained."""
        return self.pipeline.transformer

    @property
    def name(self) -> str:
        return type(self.pipeline).__name__

    def run(
        self,
        encodings: Encodings,
        image_size: tuple[int, int],
        times: Tensor | None,
        on_step: OnStep,
        forward: Callable[..., Any],
        *,
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
        given = None if times is None else (times, self._times_told(times, image_size))
        self.scheduler.follow(given, on_step)
        number = steps or len(times)  # type: ignore[arg-type]
        arguments = self._call_arguments(encodings, image_size, number, generators, output_type)
        encodings.checked = True
        with self._replaced(forward), remembered_encodings(self.pipeline, self._encoders(), encodings):
            try:
                return self.pipeline(**arguments)
            except Stop:
                return {"": None}

    def _call_arguments(
        self, encodings: Encodings, image_size: tuple[int, int], steps: int, generators: Any, output_type: str
    ) -> dict[str, Any]:
        arguments = {
            "max_area": image_size[0] * image_size[1],  # of pipelines that have an area of their own
            **self.arguments,
            # A copy: some pipelines write into it.
            "prompt": list(encodings.prompts) if self.batches else encodings.prompts[0],
            "height": image_size[0],
            "width": image_size[1],
            "num_inference_steps": steps,
            "generator": generators or torch.Generator(self.denoiser.device).manual_seed(0),
            "output_type": output_type,
        }
        if shown := encodings.images or [Image.new("RGB", image_size[::-1], "gray")] * self.stand_in:
            arguments["image"] = shown if len(shown) > 1 else shown[0]
        arguments = {name: value for name, value in arguments.items() if name in self.accepted}
        if self.modular:
            arguments["output"] = "images"
        if "enable_safety_check" in self.accepted and encodings.checked and output_type == "latent":
            arguments["enable_safety_check"] = False  # the prompts were checked the first time, and no image comes out
        return arguments

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Put our scheduler and forward in, and switch guidance and progress bars off."""
        grad = torch.is_grad_enabled()

        def forward_with_grad(*args: Any, **kwargs: Any) -> Any:
            torch.set_grad_enabled(grad)  # until the pipeline's own `no_grad` ends
            return forward(*args, **kwargs)

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(attributes(self.pipeline, scheduler=self.scheduler.inside))
            stack.enter_context(attributes(self.denoiser, forward=forward_with_grad))
            for guider in self._components(BaseGuidance):
                stack.enter_context(attributes(guider, _enabled=False))
            for part, network in self.pipeline.components.items():
                if isinstance(network, nn.Module) and hasattr(network, "generate"):
                    stack.enter_context(attributes(network, generate=self._refuse_to_write(part)))
            for looping in _with_progress_bars(self.pipeline):
                stack.enter_context(attributes(looping, _progress_bar_config={"disable": True}))
            yield

    def _refuse_to_write(self, part: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise ValueError(
                f"{self.name} has its {part!r} write text in each call, so that an image is not painted from the "
                "prompt that was given, nor twice from the same. Switch it off by an argument of its call, such as "
                "painter_arguments={'enable_prompt_rewrite': False}, or take another pipeline."
            )

        return refuse

    def _components(self, kind: type) -> list[Any]:
        return [component for component in self.pipeline.components.values() if isinstance(component, kind)]

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """Tokenizers of the pipeline, those of its processors included."""
        parts = [getattr(part, "tokenizer", part) for part in self.pipeline.components.values()]
        return [part for part in parts if isinstance(part, PreTrainedTokenizerBase)]

    def _encoders(self) -> list[nn.Module]:
        painting = (self.denoiser, getattr(self.pipeline, "vae", None))
        return [network for network in self._components(nn.Module) if network not in painting]

    # Times

    def own_schedule(self, steps: int, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the pipeline's own flow times (steps + 1,), and what the transformer is told of them (steps,)."""
        self.run(self.idle_encodings(1), image_size, None, stop, stop, steps=steps)
        inside = self.scheduler.inside
        return inside.sigmas.double().cpu(), inside.timesteps.double().cpu()

    def _times_told(self, times: Tensor, image_size: tuple[int, int]) -> Tensor:
        """
        Turn flow times into what the transformer is told. Most often that is 1000 t, but a pipeline may shift the one
        and not the other: its own schedule of many steps says what belongs together.
        """
        full = self.scheduler.inside.config.num_train_timesteps
        if image_size not in self._told:
            sigmas, told = (x.numpy() for x in self.own_schedule(1000, image_size))
            same = np.abs(told - full * sigmas[:-1]).max() < 1e-3 * full
            self._told[image_size] = None if same else (np.append(sigmas[:-1], 0.0)[::-1], np.append(told, 0.0)[::-1])
        table = self._told[image_size]
        if table is None:
            return times.float() * full
        return torch.from_numpy(np.interp(times.double().cpu().numpy(), *table)).float()

    # Parts of a run

    def idle_encodings(self, batch_size: int) -> Encodings:
        """Give the text encoders something to have returned where nobody looks at it."""
        if len(self._idle.prompts) != batch_size:
            self._idle = Encodings([PROBE] * batch_size)  # filled by the first run
        return self._idle

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Compute the transformer's own forward. States are float32, it computes in its own precision; times stay, as
        rounding would move them.
        """
        dtype, forward = self.denoiser.dtype, type(self.denoiser).forward
        names = [*signature(forward).parameters][1:] + [""] * len(args)  # of a wrapper: none
        args = tuple(
            x if is_time(name) else _cast(x, torch.float32, dtype) for x, name in zip(args, names, strict=False)
        )
        kwargs = {name: x if is_time(name) else _cast(x, torch.float32, dtype) for name, x in kwargs.items()}
        with nullcontext() if dtype == torch.float32 else linears_cast():
            return _cast(forward(self.denoiser, *args, **kwargs), dtype, torch.float32)

    def nothing(self, *args: Any, **kwargs: Any) -> Any:
        """Return a zero in the structure of the transformer's output, of sizes that fit any: nobody looks at it."""
        zero = torch.zeros((), dtype=self.denoiser.dtype, device=self.denoiser.device)
        return tree_map(lambda x: zero.expand([1] * x.ndim) if isinstance(x, Tensor) else x, self.sample_output)


def is_time(argument: str) -> bool:
    """Say whether an argument of a transformer's forward is a time, as diffusers names them."""
    return "time" in argument or argument == "t"


@contextmanager
def linears_cast() -> Iterator[None]:
    """
    Let linear layers in half precision take float32: some networks embed a time in the dtype that it is given in.
    """

    def cast(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not isinstance(module, nn.Linear) or not inputs or not module.weight.is_floating_point():
            return None
        return (_cast(inputs[0], torch.float32, module.weight.dtype), *inputs[1:])

    handle = register_module_forward_pre_hook(cast)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _with_progress_bars(pipeline: Any) -> Iterator[Any]:
    """Yield the pipeline, or those blocks of a modular one, that may show a progress bar."""
    if hasattr(pipeline, "set_progress_bar_config"):
        yield pipeline
    blocks = getattr(pipeline, "_blocks", pipeline)
    for block in getattr(blocks, "sub_blocks", {}).values():
        yield from _with_progress_bars(block)


def _cast(tree: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """Cast the tensors of one dtype, wherever they are, to another."""
    if source == target:
        return tree
    return tree_map(lambda x: x.to(target) if isinstance(x, Tensor) and x.dtype == source else x, tree)
