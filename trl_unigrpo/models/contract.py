"""The contract of a unified model: first what a model must bring, then what it gets for it.

A unified model is a transformers `PreTrainedModel` with `GenerationMixin` that also paints. A third party's joins by
this mixin alone (docs/models.md); [`check_contract`] names what one lacks, and `trl_unigrpo.testing.contract_tests`
proves that it keeps what it promises.

Shapes: B trajectories, S steps, T text tokens, H hidden size, `latent` the model's own latent dimensions (BAGEL: N
tokens of C numbers).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..flow.guidance import Velocity, guide_where_covered
from ..trajectory import Passage, Steps, Trajectory, in_order
from .reference import adapters_off, trained_weights, weights_in_place
from .seeing import SeesImages


@dataclass
class UnifiedOutput(ModelOutput):
    """
    Output of the backbone.

    Attributes:
        last_hidden_state: (B, T, H) of the text rows.
        velocity: (S, *latent) of steps, or None.
        logits: (N, vocabulary) of positions that supervised fine-tuning scores, or None.
        router_logits: of each layer of a mixture of experts that was asked for them (`output_router_logits`), or None.
    """

    last_hidden_state: Tensor | None = None
    velocity: Tensor | None = None
    logits: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


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


# What the mixin is mixed into; a base class in the eyes of the type checker alone.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class UnifiedModelMixin(SeesImages, _Base):
    """
    Mixin of a transformers `PreTrainedModel` with `GenerationMixin` that also paints.

    A model brings text as any causal LM in TRL does (`generate`, `get_output_embeddings`) and the methods named in
    `REQUIRED_METHODS`; one that computes text and velocities in one call (`packs_velocities`) brings
    `PACKED_METHODS` too.
    """

    # 1. What a model must bring

    def backbone(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> UnifiedOutput:
        """
        Compute the hidden states (B, T, H) of text rows in the padded layout given, before the language head.

        A mixture of experts whose configuration has `output_router_logits` takes it as an argument too, for the loss
        that balances its experts.
        """
        raise NotImplementedError

    def contexts(self, trajectories: Sequence[Trajectory]) -> list[Any]:
        """
        Say what stands before the next image of each trajectory: its prompt, and its rounds' texts and images.

        In a form that can be kept in a checkpoint: tensors, numbers, texts, lists, dicts, and dataclasses of these
        that `context_types` names.
        """
        raise NotImplementedError

    def encode_context(self, contexts: Sequence[Any]) -> Any:
        """
        Encode B contexts once, for any number of velocities. Those of images of one text are one object, which need
        not be encoded twice.
        """
        raise NotImplementedError

    def predict_velocity(
        self, context: Any, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """Predict the velocity (B, *latent), float32, at states (B, *latent) and times (B,); the context stays."""
        raise NotImplementedError

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Give the shape of one image's latents; raise ValueError for a size that the model can't paint."""
        raise NotImplementedError

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode images (B, 3, height, width) in [-1, 1] to clean latents (B, *latent)."""
        raise NotImplementedError

    def decode_latents(self, latents: Tensor, image_size: tuple[int, int], output_type: str = "pil") -> Any:
        """
        Decode latents (B, *latent) to a list of PIL images, or ("pt") to a tensor (B, 3, H, W), differentiable and
        about in [-1, 1].

        PIL images of pixels that are not finite numbers are to be marked: [`~trl_unigrpo.images.mark_failed`].
        """
        raise NotImplementedError

    def is_image_parameter(self, name: str) -> bool:
        """Say whether a parameter of this name belongs to the image expert (else to the text expert, or to both)."""
        raise NotImplementedError

    def default_lora_targets(self, experts: str = "both") -> str:
        """Give a regular expression of the modules to adapt; `experts` is "text", "image" or "both"."""
        raise NotImplementedError

    # 2. What a model that packs must bring

    packs_velocities: bool = False
    """True where text and all velocities come from one call."""

    def packed_forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        steps: Steps,
        context_grad: bool = False,
        passages: Sequence[Sequence[Passage]] | None = None,
    ) -> UnifiedOutput:
        """
        Compute hidden states of text rows and the velocities (S, *latent) of steps in one call.

        Args:
            steps: their `row` is the text row that they belong to.
            context_grad: whether the steps' loss reaches the text's weights through the context.
            passages: as in `call_backbone`, of a model with an `image_placeholder`.
        """
        raise NotImplementedError

    def predict_velocities(self, steps: Steps, context_grad: bool = False) -> Tensor:
        """Predict all velocities (S, *latent), float32, in one call without text outputs."""
        raise NotImplementedError

    # 3. What a model may bring

    chat_template: str | None = None
    """Chat template that the model was trained with, where its tokenizer brings none or another; None to keep that."""

    tokenizer: PreTrainedTokenizerBase | None = None
    """The model's tokenizer, where it brings one; else it is read from the model's folder."""

    frozen_modules: Sequence[str] = ()
    """Names of the parts that belong to neither expert and are not trained: adapters may not go there."""

    gathered_layers: Sequence[str] = ()
    """
    Classes of the layers that FSDP2 gathers one by one, all of which run in every forward. By default those that the
    model and its parts declare as transformers' `_no_split_modules`.
    """

    context_types: Sequence[type] = (ContextRow,)
    """Dataclasses that `contexts` may return."""

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

    def try_out(self, device: torch.device) -> None:
        """
        Find out what only a run of the model tells, and raise ValueError if it can't be trained. Trainers ask before
        anything expensive, with the device that they train on. By default there is nothing to find out.
        """
        return

    def compile_layers(self, backend: str = "inductor") -> None:
        """
        Have torch.compile make kernels for parts of each layer, for `compile_layers=True`. By default there are none.

        Raises:
            ValueError: for a model that doesn't know which parts.
        """
        raise ValueError(f"compile_layers=True: {type(self).__name__} has no parts that compile. Leave it False.")

    def check_trained_weights(self) -> None:
        """Raise ValueError, naming them, if weights are to be trained that can't be. By default all can."""
        return

    def served_thinker(self) -> nn.Module:
        """
        Give the part that vLLM samples thinkings with, for `use_vllm=True`: it knows the folder or hub id
        `name_or_path`, and all parameters but the image expert's by their names.

        Raises:
            ValueError: for a model that vLLM can't think for, as it is by default.
        """
        raise ValueError(
            f"use_vllm=True: {type(self).__name__} does not say which part of it vLLM can sample thinkings with. "
            "Leave it out, or override `served_thinker`."
        )

    def initial_latents(self, image_size: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor | None:
        """
        Draw the noise (B, *latent), float32, that images start from, each by its own generator. None for independent
        numbers in the order of the latents.
        """
        return None

    def branch_contexts(self, trajectories: Sequence[Trajectory], branch: str) -> list[Any]:
        """
        Say what a branch of guidance sees instead: "text", no prompt, or "image", no thinking.

        Only the model knows what it was trained to see there; one that does not say can't be guided. Supervised
        fine-tuning shows the first to a share of images (`context_dropout`).
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say what the branch {branch!r} of guidance sees. Leave guidance out (a "
            "scale of 1, context_dropout=0), or override `branch_contexts`."
        )

    def images_at_once(self, image_size: tuple[int, int]) -> int | None:
        """Tell how many images of a size can be denoised together in the memory that is free; None for any number."""
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

    def quick_start(self, source: str, painting: Mapping[str, Any]) -> str | None:
        """
        Write a section of the model card that paints with the model saved at `source`; None for the package's.

        Args:
            painting: how it was trained, as arguments of `generate`: `image_size`, `num_inference_steps`,
                `max_completion_length`, and others that are not `generate`'s own.
        """
        return None

    # 4. What a model gets

    @property
    def base_model(self) -> Callable[..., UnifiedOutput]:
        """The backbone, all but the language head, as TRL's fused head calls it."""
        return self.call_backbone

    def call_backbone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        steps: Steps | None = None,
        context_grad: bool = False,
        into: list[Tensor] | None = None,
        passages: Sequence[Sequence[Passage]] | None = None,
        **kwargs: Any,
    ) -> UnifiedOutput:
        """
        Compute hidden states of text rows and, of `steps`, velocities: in one call, or one after the other.

        Args:
            passages: for each text row what it is read as, with the images that it shows; None for the row itself.
            into: where the velocities go too, for a caller that sees only the language head's output.
            kwargs: further arguments of `backbone`.
        """
        read_as: dict[str, Any] = {} if passages is None else {"passages": passages}
        if steps is not None and self.packs_velocities:
            outputs = self.packed_forward(input_ids, attention_mask, steps, context_grad, **read_as)
        else:
            # PEFT's wrapper for language models passes on all that one could take, as None.
            kwargs = {name: value for name, value in kwargs.items() if value is not None} | read_as
            outputs = self.backbone(input_ids, attention_mask, **kwargs)
            if steps is not None:
                velocity = in_order(self.velocities(steps, context_grad))
                outputs = replace(outputs, velocity=velocity)
        if into is not None and outputs.velocity is not None:
            into.append(outputs.velocity)
        return outputs

    def velocities(
        self,
        steps: Steps,
        context_grad: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Yield `(index, velocity)` until every step has been there once: `index` (S',) are numbers of steps, `velocity`
        (S', *latent) theirs, guided as the sampler's was, with gradient.

        A model that packs yields once, with all. Others yield the k-th steps of all images, k = 0, 1, ..: each can be
        back-propagated, and its memory freed, before the next is asked for.

        Args:
            context_grad: whether the steps' loss reaches the text's weights through the context.
            autocast: the precision that velocities are computed in; what is done with them is not.
        """
        encoded: dict[Any, Any] = {}
        for index in [torch.arange(len(steps))] if self.packs_velocities else steps.by_place():
            part = steps if len(index) == len(steps) else steps[index]
            with autocast():
                velocity = self.guided(part, self._velocity_at(part, context_grad, encoded), context_grad, encoded)
            yield index, velocity

    def guided(
        self, steps: Steps, velocity: Tensor, context_grad: bool = False, encoded: dict[Any, Any] | None = None
    ) -> Tensor:
        """Guide the velocities (S, *latent) of steps as the sampler's were; without guidance they stay."""
        guidance = steps.guidance
        if not guidance.branches:
            return velocity
        branches = {
            name: self._velocity_at(steps.branch(name), context_grad, {} if encoded is None else encoded)
            for name in guidance.branches
        }
        return guide_where_covered(velocity, branches, steps.t, guidance)

    def _velocity_at(self, steps: Steps, context_grad: bool, encoded: dict[Any, Any]) -> Tensor:
        """Compute the velocities of steps behind their own contexts; those in `encoded` are not encoded again."""
        steps = steps.to(self.device)
        if self.packs_velocities:
            return self.predict_velocities(steps, context_grad)
        contexts = steps.contexts
        key = tuple(map(id, contexts))
        if key not in encoded or context_grad:
            with torch.set_grad_enabled(torch.is_grad_enabled() and context_grad):
                encoded[key] = self.encode_context(contexts)
        return self.predict_velocity(encoded[key], steps.x, steps.t.to(self.device), steps.image_size)

    def velocity_after(self, contexts: Sequence[Any], image_size: tuple[int, int]) -> Velocity:
        """Give the velocity of images behind these contexts, which are encoded once."""
        return partial(self.predict_velocity, self.encode_context(contexts), image_size=image_size)

    largest_image_batch: int | None = None
    """Images at once that the memory held when it had run out with more; None before."""

    _reference: dict[str, Tensor] | None = None

    def keep_reference(self, device: torch.device | str | None = None) -> None:
        """Keep the weights that are trained as they are now, on a device: they are the reference from here on."""
        kept = trained_weights(self, copied=True)
        self._reference = {name: weight.to(device or weight.device) for name, weight in kept.items()}

    def release_reference(self) -> None:
        """Let go of what `keep_reference` kept."""
        self._reference = None

    @property
    def kept_reference(self) -> dict[str, Tensor] | None:
        """The weights that `keep_reference` kept, by name, or None."""
        return self._reference

    @contextmanager
    def reference(self) -> Iterator["UnifiedModelMixin"]:
        """
        Make this model the reference model: with the weights of `keep_reference` if there are some, else with its
        adapters switched off. Weights, and which of them are trained, are the same before and after.
        """
        with adapters_off(self) if self._reference is None else weights_in_place(self, self._reference):
            yield self


REQUIRED_METHODS = (
    *("backbone", "contexts", "encode_context", "predict_velocity", "latent_shape", "encode_images", "decode_latents"),
    *("is_image_parameter", "default_lora_targets"),
)
"""Methods that a model must bring."""

PACKED_METHODS = ("packed_forward", "predict_velocities")
"""Methods that a model with `packs_velocities` must bring too."""

OUTSIDE_FORWARD = ("encode_context", "predict_velocity", "predict_velocities", "encode_images", "decode_latents")
"""Methods that use weights and are called outside of the model's `forward`, hence of any wrapper around it."""

TEXT_METHODS = ("forward", "generate", "get_output_embeddings", "get_input_embeddings")
"""Methods of a causal language model that TRL calls."""


def check_contract(model: Any) -> None:
    """
    Raise TypeError, naming each, if a unified model lacks methods of the contract.

    Args:
        model: a [`UnifiedModelMixin`], out of any wrapper.
    """
    kind = type(model)
    wanted = (*REQUIRED_METHODS, *(PACKED_METHODS if kind.packs_velocities else ()))
    missing = [name for name in wanted if getattr(kind, name, None) is getattr(UnifiedModelMixin, name)]
    missing += [name for name in TEXT_METHODS if getattr(kind, name, None) in (None, getattr(nn.Module, name, None))]
    if missing:
        raise TypeError(
            f"{kind.__name__} lacks {', '.join(missing)}. A unified model must bring these methods: "
            "trl_unigrpo.models.contract.UnifiedModelMixin says what each gives, docs/models.md shows a whole model."
        )
