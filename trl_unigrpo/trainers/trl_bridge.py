"""The bridge to TRL: private hooks that this package assumes, checked before anything else runs, and velocities that
travel through TRL's one forward."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
import trl
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import ModelOutput
from trl import GRPOTrainer

from ..models.contract import UnifiedModelMixin, UnifiedOutput
from ..models.patching import attributes
from ..trajectory import Steps
from .trl_versions import TRLChangedError, check_options, note_untested


# Not TRL's public API: every such name is imported here, and by other modules from here.
try:
    from trl.extras.profiling import profiling_context
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.import_utils import is_vllm_available
    from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
    from trl.trainer.utils import add_fused_lm_head, get_callable_name, is_async_callable, nanstd
except ImportError as error:
    if (error.name or "").split(".")[0] != "trl":
        raise
    raise TRLChangedError(str(error)) from error

Autocast = Callable[[], AbstractContextManager]

__all__ = [
    "ATTRIBUTES",
    "ENGINE_HOOKS",
    "HOOKS",
    "OF_SAMPLING",
    "Autocast",
    "PackedOutput",
    "ReferencePolicy",
    "TRLChangedError",
    "TextAndVelocities",
    "VLLMGeneration",
    "add_fused_lm_head",
    "check_attributes",
    "check_trl",
    "completions_of",
    "compute_head_in_float32",
    "disable_gradient_checkpointing",
    "generation_fields",
    "get_callable_name",
    "is_async_callable",
    "is_vllm_available",
    "nanstd",
    "profiling_context",
    "return_velocity",
    "thinking_by",
    "unwrap_model_for_generation",
    "with_rows",
]


# Hook -> parameters that the overrides rely on, in order; further ones may follow.
HOOKS: dict[str, tuple[str, ...]] = {
    "_generate": ("self", "prompts"),
    "_tokenize_prompts": ("self", "prompts"),
    "_generate_single_turn": ("self", "prompt_ids", "images", "multimodal_fields", "num_generations"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": (
        "self",
        "inputs",
        "prompts",
        "completions",
        "completion_ids_list",
    ),
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
    ),
    "_compute_loss": ("self", "model", "inputs"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_get_train_sampler": ("self", "dataset"),
    "_save": ("self", "output_dir", "state_dict"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_get_output_dir": ("self", "trial"),
    "_finalize_training": ("self", "trial"),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "_load_best_model": ("self",),
    "_prepare_for_training": ("self", "max_steps", "train_dataloader", "resume_from_checkpoint"),
    "create_accelerator_and_postprocess": ("self",),
    "save_model": ("self", "output_dir", "_internal_call"),
    "_clip_grad_norm": ("self", "model"),
    "_get_learning_rate": ("self",),
    "create_optimizer": ("self", "model"),
    "log": ("self", "logs", "start_time"),
}


# The same of the engine that samples where `use_vllm` is on.
ENGINE_HOOKS: dict[str, tuple[str, ...]] = {
    "_init_vllm": ("self",),
    "_iter_named_params": ("self",),
    "_fix_param_name_to_vllm": ("self", "name"),
    "sync_weights": ("self",),
    "generate": ("self", "prompts", "images", "num_generations"),
}


# Attributes of a constructed trainer that are used, and keys of those that are dictionaries.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "_step": (),
    "_buffered_inputs": (),
    "_tokenizer": (),
    "eos_token_ids": (),
    "use_vllm": (),
    "reward_funcs": (),
    "reward_weights": (),
    "scale_rewards": (),
    "num_iterations": (),
    "num_generations": (),
    "num_generations_eval": (),
    "log_multimodal": (),
    "temperature": (),
    "beta": (),
    "ref_model": (),
    "chat_template_kwargs": (),
    "_metrics": ("train", "eval"),
    "_pending_extra_logs": (),
    "reward_func_names": (),
    "_logs": ("images", "prompt", "completion", "rewards", "advantages"),
}
# Further ones, by whether vLLM samples.
OF_SAMPLING = {False: ("generation_config", "generation_kwargs"), True: ("vllm_generation", "_last_loaded_step")}


def check_trl() -> None:
    """
    Raise [`TRLChangedError`] if TRL is not what the overrides rely on.

    Checked are the release, the options, that each hook is there and takes the same parameters, and how the loss is
    scaled. A release that passes is used, whether or not it was tested.
    """
    check_options()
    hooks = {GRPOTrainer: HOOKS, VLLMGeneration: ENGINE_HOOKS}
    for owner, name, expected in [(owner, *hook) for owner, own in hooks.items() for hook in own.items()]:
        hook = getattr(owner, name, None)
        if hook is None:
            raise TRLChangedError(f"{owner.__name__}.{name} is gone")
        found = tuple(inspect.signature(hook).parameters)
        if found[: len(expected)] != expected:
            raise TRLChangedError(f"{owner.__name__}.{name} takes {found}, expected {expected}")
    if getattr(_module_of_trainer(), "VLLMGeneration", None) is not VLLMGeneration:
        raise TRLChangedError("GRPOTrainer does not think by VLLMGeneration")
    if getattr(GRPOTrainer, "loss_is_scaled_for_ga", None) is not True:
        raise TRLChangedError("GRPOTrainer.loss_is_scaled_for_ga is not True")
    note_untested(trl.__version__)


def check_attributes(trainer: GRPOTrainer) -> None:
    """Raise [`TRLChangedError`] if a constructed trainer lacks an attribute, or a key in it, that is used here."""
    for name, keys in {**ATTRIBUTES, **dict.fromkeys(OF_SAMPLING[bool(trainer.args.use_vllm)], ())}.items():
        if not hasattr(trainer, name):
            raise TRLChangedError(f"GRPOTrainer has no attribute {name}")
        missing = [key for key in keys if key not in getattr(trainer, name)]
        if missing:
            raise TRLChangedError(f"GRPOTrainer.{name} has no key {missing[0]!r}")
    if any(map(is_async_callable, trainer.reward_funcs)) and not hasattr(trainer, "async_loop"):
        raise TRLChangedError("GRPOTrainer has no attribute async_loop, where a reward function is asynchronous")


def _module_of_trainer() -> Any:
    return sys.modules[GRPOTrainer.__module__]


def thinking_by(engine: type[VLLMGeneration]) -> AbstractContextManager[None]:
    """Have trainers that are made meanwhile use an engine of this class, where they use vLLM."""
    return attributes(_module_of_trainer(), VLLMGeneration=engine)


def generation_fields(outputs: tuple) -> tuple[list[list[int]], list[list[int]], dict]:
    """Find prompt ids, completion ids and the extra reward columns among what `GRPOTrainer._generate` returns."""
    dicts = [value for value in outputs if isinstance(value, dict)]
    ids = outputs[:2]
    if len(dicts) != 1 or not all(
        isinstance(rows, list) and len(rows) == len(ids[0]) and all(isinstance(row, list) for row in rows)
        for rows in ids
    ):
        raise TRLChangedError(
            "GRPOTrainer._generate no longer returns prompt ids, completion ids and one dict of extra fields"
        )
    return ids[0], ids[1], dicts[0]


def completions_of(outputs: tuple) -> list[Any]:
    """Find the completions, as reward functions get them, among what `GRPOTrainer._generate` returns."""
    if len(outputs) < 4 or not isinstance(outputs[3], list) or len(outputs[3]) != len(outputs[0]):
        raise TRLChangedError("GRPOTrainer._generate no longer returns a completion for each prompt")
    found: list[Any] = outputs[3]
    return found


def with_rows(
    outputs: tuple, completion_ids: list[list[int]], tool_mask: list[list[int]], completions: list[Any]
) -> tuple:
    """Put other rows, and which of their tokens were sampled, into what `GRPOTrainer._generate` returned."""
    if len(outputs) < 4 or outputs[2] is not None or len(outputs[3]) != len(completion_ids):
        raise TRLChangedError("GRPOTrainer._generate no longer returns ids, a mask of tools and completions")
    return (outputs[0], completion_ids, tool_mask, completions, *outputs[4:])


# One forward for the text and the velocities, through TRL's language head and any wrapper around the model.


class ReferencePolicy:
    """The reference model that TRL calls: the policy itself, as it was where training started."""

    def __init__(self, base: UnifiedModelMixin, model: Callable[..., Any]):
        self.base, self.model = base, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.base.reference():
            return self.model(*args, **kwargs)


@dataclass
class PackedOutput(ModelOutput):
    """TRL's text outputs and the velocities (S, *latent) of the same forward."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None
    velocity: Tensor | None = None


def return_velocity(base: UnifiedModelMixin) -> None:
    """
    Let the model, whose forward TRL has replaced by its fused head, return velocities when a call brings steps.

    They travel in the output, not past it: a hook would break DDP, which looks for its parameters there.
    """
    forward = base.forward

    def of_text(*args: Any, **kwargs: Any) -> Any:
        # TRL reads the head's weight without calling the head, and would gather it past FSDP's reduction.
        if isinstance(head := base.get_output_embeddings(), FSDPModule):
            head.unshard()
        return forward(*args, **kwargs)

    def packed_forward(*args: Any, steps: Steps | None = None, context_grad: bool = False, **kwargs: Any) -> Any:
        if steps is None:
            return of_text(*args, **kwargs)
        velocities: list[Tensor] = []
        outputs = of_text(*args, steps=steps, context_grad=context_grad, into=velocities, **kwargs)
        return PackedOutput(outputs.log_probs, outputs.entropy, outputs.aux_loss, *velocities)

    packed_forward.__wrapped__ = forward.__func__ if hasattr(forward, "__func__") else forward  # type: ignore[attr-defined]
    base.forward = packed_forward


def take_steps(base: UnifiedModelMixin) -> None:
    """
    Let the model's own forward take steps too, and return velocities then, and the logits (N, vocabulary) that follow
    the N positions `scored` (B, T): all in the one call that a wrapper around the model sees.
    """

    @functools.wraps(type(base).forward)  # keeps its signature, which `generate` asks for
    def forward(
        self: Any,
        *args: Any,
        steps: Steps | None = None,
        context_grad: bool = False,
        scored: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if steps is None:
            return type(self).forward(self, *args, **kwargs)
        outputs = self.call_backbone(*args, steps=steps, context_grad=context_grad, **kwargs)
        logits = self.get_output_embeddings()(outputs.last_hidden_state[scored])
        return UnifiedOutput(velocity=outputs.velocity, logits=logits)

    base.forward = MethodType(forward, base)  # a method, so that a copy of the model gets its own


def compute_head_in_float32(base: UnifiedModelMixin, temperature: float) -> None:
    """
    Bring the language head to float32, as TRL's `cast_lm_head_to_fp32` does for a model whose head is `model.lm_head`.

    Args:
        temperature: of the log-probs.
    """
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    dtype = head.weight.dtype
    head.float()

    def forward(self: Any, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight, self.bias)

    head.forward = MethodType(forward, head)
    if embeddings.weight is head.weight:
        embeddings.register_forward_hook(lambda module, args, output: output.to(dtype))
    add_fused_lm_head(base, temperature, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))


class TextAndVelocities:
    """
    The forward of one micro-batch: its text's, and the velocities of its steps.

    A model that packs computes both at once, in the call of [`pack`]; another computes its velocities when they are
    asked for.
    """

    def __init__(self, base: UnifiedModelMixin, steps: Steps, context_grad: bool, autocast: Autocast):
        self.base, self.steps, self.context_grad, self.autocast = base, steps, context_grad, autocast
        self._packed: Tensor | None = None

    def pack(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """Add the steps to the call that TRL makes of a model, and keep their velocities here."""
        if not self.base.packs_velocities:
            return model

        def call(*args: Any, **kwargs: Any) -> Any:
            outputs = model(*args, steps=self.steps, context_grad=self.context_grad, **kwargs)
            self._packed = outputs.velocity
            return outputs

        return call

    def parts(self, model: Any, text_loss: Callable[[], Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """
        Yield as the model's own `velocities` does, with the text's loss beside the last part and None before.

        The text's forward is the one that goes through DDP, which expects one backward pass of it: those of the parts
        before only accumulate.

        Args:
            model: that TRL calls, in its wrapper.
            text_loss: calls TRL's loss.

        Raises:
            TRLChangedError: if TRL made no packed call.
        """
        if not self.base.packs_velocities:
            done = 0
            for index, velocity in self.base.velocities(self.steps, self.context_grad, self.autocast):
                done += len(index)
                last = done == len(self.steps)
                yield index, velocity, text_loss() + no_gradient(model) if last else None
            return
        loss = text_loss()
        packed, self._packed = self._packed, None
        if packed is None:
            raise TRLChangedError("GRPOTrainer._compute_loss did not call _get_per_token_logps_and_entropies")
        with self.autocast():
            velocity = self.base.guided(self.steps, packed, self.context_grad)
        yield torch.arange(len(self.steps)), velocity, loss


def no_gradient(model: Any) -> Tensor | float:
    """Give 0, whose gradient is one of 0 for each trained weight: DDP waits for all, and a painter may not use all."""
    if not isinstance(model, DistributedDataParallel) or not model.require_backward_grad_sync:
        return 0.0
    return torch.stack([p[None][:0].sum().float() for p in model.parameters() if p.requires_grad]).sum()
