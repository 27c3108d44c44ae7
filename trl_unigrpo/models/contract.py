"""What any unified model offers the trainer: the contract, and the parts of it that follow from two primitives.

Shapes: B samples, K noisy copies of each sample's image, T text tokens, H hidden size, `latent` the model's own latent
dimensions (BAGEL: N tokens of C numbers).
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..flow.guidance import Guidance, guide_where_covered
from ..flow.sampler import (
    FlowRecord,
    RolloutPlan,
    Velocity,
    sample_latents,
)


@dataclass
class UnifiedOutput(ModelOutput):
    """Output of the backbone: `last_hidden_state` (B, T, H) of the text rows, `velocity` (B, K, *latent) or None."""

    last_hidden_state: Tensor | None = None
    velocity: Tensor | None = None


@dataclass
class Conditioning:
    """
    What the images of a batch are painted from: the tokens of one prompt and one thinking per sample, as sampled.

    An empty thinking means none: the image then follows the prompt itself.

    Attributes:
        system_ids: tokens of each prompt's system message, empty where it has none; needed for guidance alone.
        images: for each sample the finished images that its prompt shows by a placeholder each, in the model's own
            form; None where no sample has any.
        prompts: the prompts themselves, strings or conversations, for a model that paints from text.
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    system_ids: Sequence[Sequence[int]] | None = None
    images: Sequence[Sequence[Any]] | None = None
    prompts: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass
class ContextRow:
    """
    All that stands before an image.

    Attributes:
        ids: (L,) tokens, on the CPU; a placeholder for each finished image.
        images: these images, in the model's own form.
    """

    ids: Tensor
    images: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class FlowInputs:
    """
    The noisy copies of a packed call, and the contexts that they see.

    Attributes:
        latents: (B, K, *latent) float32 states x_t.
        timesteps: (B, K) times in [0, 1].
        contexts: each sample's context, as the model's `contexts` gives them.
        image_size: (height, width) in pixels, one for the batch.
        context_grad: whether the copies' loss reaches the text's weights through the context.
        visible: for each of the B samples the K numbers of ids, from the context's start, that its copies see; None if
            they see all of it.
        velocity: (B, K, *latent) filled in by `base_model`, for a caller that sees only the language head's output.
    """

    latents: Tensor
    timesteps: Tensor
    contexts: Sequence[Any]
    image_size: tuple[int, int]
    context_grad: bool = False
    visible: Sequence[Sequence[int]] | None = None
    velocity: Tensor | None = None

    @property
    def visible_ids(self) -> Sequence[Sequence[int]]:
        """(B, K) `visible`, written out."""
        return self.visible or [[len(row)] * self.timesteps.shape[1] for row in self.contexts]


# What the mixin is mixed into; a base class in the eyes of the type checker alone.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class UnifiedModelMixin(_Base):
    """
    Mixin of a transformers `PreTrainedModel` with `GenerationMixin` that also paints.

    A model brings text as any causal LM in TRL does (`generate`, `get_output_embeddings`), the primitives below that
    are marked abstract, and gets from here what the trainer calls: `base_model`, `rollout`, `velocities` and
    `reference`. A model whose context and denoiser do not separate overrides those instead.
    """

    packs_velocities: bool = True
    """Whether `backbone(..., flow=...)` computes the text and all K velocities in one call."""

    chat_template: str | None = None
    """Chat template that the model was trained with, where its tokenizer brings none or another; None to keep that."""

    tokenizer: PreTrainedTokenizerBase | None = None
    """The model's tokenizer, where it brings one; else it is read from the model's folder."""

    frozen_modules: Sequence[str] = ()
    """Names of the parts that belong to neither expert and are not trained: adapters may not go there."""

    _reference: Any = None

    @property
    def suppressed_token_ids(self) -> Sequence[int]:
        """Tokens never sampled in a thinking."""
        return ()

    @property
    def default_system_prompt(self) -> str | None:
        """System prompt put before prompts that bring none, or None."""
        return None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError, saying what to do, if a tokenizer is not this model's. By default any will do."""
        return

    # What a model brings

    @abstractmethod
    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        flow: FlowInputs | None = None,
    ) -> UnifiedOutput:
        """Hidden states (B, T, H) of text rows in the padded layout given, with the velocities of `flow`."""

    @abstractmethod
    def encode_context(self, contexts: Sequence[Any]) -> Any:
        """Encode B contexts once, for any number of velocities."""

    @abstractmethod
    def predict_velocity(
        self, context: Any, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """Velocity (B, *latent), float32, at states (B, *latent) and times (B,). Leaves the context as it is."""

    @abstractmethod
    def contexts(self, conditioning: Conditioning) -> Sequence[Any]:
        """
        What stands before each sample's image, prompt and thinking, in a form that has a length and can be kept in a
        checkpoint: a `ContextRow`, or a string.
        """

    @abstractmethod
    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one image's latents; raises ValueError for a size that the model can't paint."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Clean latents (B, *latent) of images (B, 3, height, width) in [-1, 1]."""

    @abstractmethod
    def decode_latents(self, latents: Tensor, image_size: tuple[int, int], output_type: str = "pil") -> Any:
        """
        Images of latents (B, *latent): a list of PIL images, or ("pt") a tensor (B, 3, H, W), differentiable and about
        in [-1, 1].
        """

    @abstractmethod
    def predict_velocities(self, flow: FlowInputs) -> Tensor:
        """All K velocities (B, K, *latent), float32, in one packed call without text outputs."""

    @abstractmethod
    def is_image_parameter(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the image expert (else to the text expert, or to both)."""

    @abstractmethod
    def default_lora_targets(self, experts: str = "both") -> str:
        """Regular expression of the modules to adapt; `experts` is "text", "image" or "both"."""

    def initial_latents(self, image_size: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor | None:
        """
        The noise (B, *latent), float32, that images start from, each drawn by its own generator. None for independent
        numbers in the order of the latents.
        """
        return None

    def save_adapters(self, folder: str | Path) -> None:
        """
        Write trained adapters in the formats of other libraries too, where these can load parts of the model. Called
        whenever a trainer has saved it.
        """
        return

    def load_checkpoint(self, folder: str | Path) -> bool:
        """
        Take over all weights of a checkpoint that `save_pretrained` wrote in a form of the model's own.

        Returns:
            False where the form is that of transformers, which the trainer reads itself.
        """
        return False

    def quick_start(self, source: str) -> str | None:
        """A section of the model card that paints with the model saved at `source`; None for the package's own."""
        return None

    def images_at_once(self, image_size: tuple[int, int]) -> int | None:
        """How many images of a size can be denoised together in the memory that is free; None for any number."""
        return None

    def guidance_conditioning(self, conditioning: Conditioning, branch: str) -> Conditioning:
        """
        What a branch of guidance sees instead: "text", without the prompt, or "image", without the thinking.

        Only the model knows what it was trained to see there; one that does not say can't be guided.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say what the branch {branch!r} of guidance sees. Sample without guidance "
            "(a scale of 1), or override `guidance_conditioning`."
        )

    # What the trainer calls

    @property
    def base_model(self) -> Callable[..., UnifiedOutput]:
        """The backbone, all but the language head, as TRL's fused head calls it."""
        return self._call_backbone

    def _call_backbone(self, *args: Any, flow: FlowInputs | None = None, **kwargs: Any) -> UnifiedOutput:
        # PEFT's wrapper for language models passes on all that one could take, as None.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        outputs = self.backbone(*args, **{**kwargs, "flow": flow})
        if flow is not None:
            flow.velocity = outputs.velocity
        return outputs

    @torch.no_grad()
    def rollout(
        self, conditioning: Conditioning, plan: RolloutPlan, generators: Sequence[torch.Generator]
    ) -> list[FlowRecord]:
        """
        Paint one image per sample (the hybrid ODE/SDE sampler of the plan) and record the SDE steps. The branches of
        guidance are further contexts, whose velocities are computed one after the other.

        Args:
            conditioning: prompts and thinkings, B samples.
            plan: steps, windows, noise, guidance and size of the images.
            generators: B random generators; each draws all the noise of its own sample, so that the result does not
                depend on how samples are batched.
        """
        shape = self.latent_shape(plan.image_size)
        rows = self.contexts(conditioning)
        if len(generators) != len(rows):
            raise ValueError(f"Got {len(generators)} generators for {len(rows)} samples: pass one per sample.")
        names = plan.guidance.branches if plan.guidance is not None else ()
        branches = {name: self.contexts(self.guidance_conditioning(conditioning, name)) for name in names}
        records: list[FlowRecord] = []
        size = plan.batch_size or max(1, self.images_at_once(plan.image_size) or len(rows))
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            records += sample_latents(
                self._velocity_after(rows[chunk], plan.image_size),
                shape=shape,
                start=self.initial_latents(plan.image_size, generators[chunk]),
                plan=plan.rows(chunk),
                generators=generators[chunk],
                contexts=rows[chunk],
                device=self.device,
                branches={
                    name: self._velocity_after(branch[chunk], plan.image_size) for name, branch in branches.items()
                },
                branch_contexts={name: branch[chunk] for name, branch in branches.items()},
            )
        return records

    def _velocity_after(self, rows: Sequence[Any], image_size: tuple[int, int]) -> Velocity:
        """The velocity of images behind these contexts, which are encoded once."""
        context = self.encode_context(rows)
        return partial(self.predict_velocity, context, image_size=image_size)

    def flow_inputs(self, records: Sequence[FlowRecord], context_grad: bool = False) -> FlowInputs:
        """Batch the recorded SDE steps of a micro-batch for a packed call."""
        sizes = sorted({record.image_size for record in records})
        if len(sizes) != 1:
            raise ValueError(f"Images of one batch must have one size, got {sizes}: make a batch per size.")
        return FlowInputs(
            latents=torch.stack([record.latents for record in records]).to(self.device),
            timesteps=torch.stack([record.timesteps for record in records]).to(self.device),
            contexts=[record.context for record in records],
            image_size=records[0].image_size,
            context_grad=context_grad,
        )

    def velocities(self, records: Sequence[FlowRecord], context_grad: bool = False) -> Iterator[tuple[int, Tensor]]:
        """
        Yield `(k, velocity)` of every recorded step k, velocity (B, *latent) with gradient, one forward each.

        The plain route of models that can't pack. A context with gradient is encoded anew for each step, so that each
        velocity can be back-propagated, and its memory freed, before the next is asked for.
        """
        flow, guidance = self.flow_inputs(records, context_grad), guidance_of(records)
        branches = {name: [record.branches[name] for record in records] for name in guidance.branches}
        contexts = {"": flow.contexts, **branches}
        encoded: dict[str, Any] = {}
        for k in range(flow.latents.shape[1]):
            if not encoded or context_grad:
                with torch.set_grad_enabled(torch.is_grad_enabled() and context_grad):
                    encoded = {name: self.encode_context(rows) for name, rows in contexts.items()}
            latents, times = flow.latents[:, k], flow.timesteps[:, k]
            predicted = {
                name: self.predict_velocity(context, latents, times, flow.image_size)
                for name, context in encoded.items()
            }
            velocity = predicted.pop("")
            yield k, guide_where_covered(velocity, predicted, times, guidance) if branches else velocity

    def guided(self, velocity: Tensor, records: Sequence[FlowRecord], context_grad: bool = False) -> Tensor:
        """
        Velocities (B, K, *latent) of the recorded states, guided as the sampler's were. A packed forward for each
        branch; none, and the velocities themselves, without guidance.
        """
        guidance, branches = guidance_of(records), {}
        if not guidance.branches:
            return velocity
        for name in guidance.branches:
            rows = [replace(record, context=record.branches[name]) for record in records]
            branches[name] = self.predict_velocities(self.flow_inputs(rows, context_grad)).flatten(0, 1)
        times = torch.stack([record.timesteps for record in records]).flatten()
        guided = guide_where_covered(velocity.flatten(0, 1), branches, times, guidance)
        return guided.view_as(velocity)

    def keep_reference(self, reference: nn.Module | None) -> None:
        """
        Keep a frozen copy as the reference of a fully fine-tuned model: no submodule, so never saved or trained.
        `None` lets an earlier one go.
        """
        kept = None if reference is None else reference.requires_grad_(False).eval()
        object.__setattr__(self, "_reference", kept)

    @contextmanager
    def reference(self) -> Iterator["UnifiedModelMixin"]:
        """
        The reference model: the frozen copy if one is kept, else this model with its adapters switched off, or
        switched to the adapter named "ref" if there is one. Which parameters are trained is the same before and
        after.
        """
        if self._reference is not None:
            yield self._reference
            return
        # Adapters, and the trained copies of whole modules (`modules_to_save`).
        layers = [
            module for module in self.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]
        if not layers:
            raise RuntimeError(
                "No reference model: the model has no adapters and no frozen copy. Call `keep_reference` first."
            )
        trainable = {parameter: parameter.requires_grad for parameter in self.parameters()}
        before = {layer: (list(layer.active_adapters), not layer.disable_adapters) for layer in layers}
        try:
            for layer in layers:
                has_reference = "ref" in layer._get_available_adapters()
                layer.enable_adapters(has_reference)
                if has_reference:
                    layer.set_adapter("ref")
            yield self
        finally:
            for layer, (active, enabled) in before.items():
                layer.set_adapter(active)
                layer.enable_adapters(enabled)
            # PEFT marks every weight of an adapter as trainable when it is switched on again.
            for parameter, requires_grad in trainable.items():
                parameter.requires_grad_(requires_grad)


def guidance_of(records: Sequence[FlowRecord]) -> Guidance:
    """The guidance that the images of a batch were sampled with, one for all."""
    if any(record.guidance != records[0].guidance for record in records):
        raise ValueError("Images of one batch were sampled with different guidance: make a batch for each.")
    return records[0].guidance or Guidance()
