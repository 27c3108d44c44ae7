"""Checks of what a user hands to the trainer, and models and tokenizers by name, before anything expensive."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.adapters import check_targets, load_trainable, saved_adapters
from ..models.contract import UnifiedModelMixin
from ..models.registry import model_skeleton, unified_model
from ..models.tokenizer import prepare_tokenizer, read_tokenizer
from .dataset_checks import check_dataset, check_training_data
from .evaluation_checks import check_evaluation
from .recipes import SINGLE_GPU
from .reward_checks import check_reward_funcs
from .source_checks import check_sources
from .turn_checks import check_turns
from .unigrpo_config import UniGRPOConfig
from .whole_checkpoints import check_writable


UNSUPPORTED = {
    "tools": "tool calls would put tokens between the thinking and the image",
    "environment_factory": "environments would put tokens between the thinking and the image",
    "rollout_func": "the rollout, thinking and image, is this trainer's own",
}


def check_arguments(
    args: Any,
    reward_funcs: Sequence[Any],
    datasets: Mapping[str, Any],
    processing_class: Any,
    unsupported: Mapping[str, Any],
) -> tuple[bool, bool]:
    """
    Raise ValueError or TypeError, with the remedy, for what the trainer can't work with; returns whether prompts show
    source images, and whether rows are stories.

    Args:
        args: the configuration.
        reward_funcs: the user's reward functions.
        datasets: `train_dataset` and `eval_dataset`; None where there is none.
        processing_class: the tokenizer, or None.
        unsupported: remaining keyword arguments.
    """
    for name, value in unsupported.items():
        if name not in UNSUPPORTED:
            raise TypeError(f"UniGRPOTrainer got an unexpected argument {name!r}.")
        if value:
            raise ValueError(f"{name} does not work with UniGRPO: {UNSUPPORTED[name]}. Leave it out.")
    if not isinstance(args, UniGRPOConfig):
        raise TypeError(f"args is a {type(args).__name__}, expected a UniGRPOConfig.")
    if (trained := datasets["train_dataset"]) is None:
        raise ValueError("train_dataset is missing: pass a dataset with a column 'prompt'.")
    columns = check_training_data(trained, args)
    if (evaluated := datasets["eval_dataset"]) is not None:
        columns = {**columns, **check_dataset(evaluated, "eval_dataset")}
    check_writable(args)
    check_evaluation(args, evaluated)
    names = {name for part in columns.values() for name in part}
    check_reward_funcs(reward_funcs, args, {"source_images" if name == "source_image" else name for name in names})
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__}, expected a tokenizer: images are generated "
            "here, not read. Pass processor.tokenizer."
        )
    return check_sources(datasets, args), check_turns(datasets, args)


def check_lengths(args: Any, base: Any) -> None:
    """Raise ValueError if a thinking may be longer than the model has positions for."""
    if args.max_completion_length is not None:
        _check_room(base, f"max_completion_length={args.max_completion_length}", args.max_completion_length)


def check_painted(args: Any, base: UnifiedModelMixin) -> None:
    """Raise ValueError for a size of training or of evaluation that the model can't paint."""
    for training, option in ((True, "image_size"), (False, "eval_image_size")):
        for size in args.sizes(training):
            try:
                base.latent_shape(size)
            except ValueError as error:
                raise ValueError(f"{option}={getattr(args, option)}: {error}") from error


def check_round_lengths(args: UniGRPOConfig, base: Any) -> None:
    """Raise ValueError if what later rounds are read as may be longer than the model has positions for."""
    first, later, looks = args.max_completion_length, args.max_reflection_length, args.most_rounds - 1
    if not looks or first is None:
        return
    if args.round_context == "markov":  # behind an image, which takes a position at least
        _check_room(base, f"max_reflection_length={later}", 1 + later)
    else:
        names = f"max_completion_length={first} and max_reflection_length={later} of {looks + 1} rounds in one context"
        _check_room(base, names, first + looks * (1 + later))


def _check_room(base: Any, names: str, length: int) -> None:
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)  # not all models have one
    if limit is not None and length >= limit:
        raise ValueError(f"{names} leaves no room for a prompt: the model has {limit} positions. Lower it.")


def question_weak_adapters(peft_config: PeftConfig, args: UniGRPOConfig) -> None:
    """Warn of LoRA scaled far below what the rates of `UniGRPOConfig.single_gpu` were chosen for, alpha / r = 2."""
    if not isinstance(peft_config, LoraConfig):
        return
    r, alpha = peft_config.r, peft_config.lora_alpha
    scale = alpha / (math.sqrt(r) if peft_config.use_rslora else r)
    rates = [name for name in ("learning_rate", "image_learning_rate") if getattr(args, name) == SINGLE_GPU[name]]
    if scale < 0.5 and rates:
        warnings.warn(
            f"peft_config: lora_alpha={alpha} with r={r} scales what adapters learn by {scale:.2g}. The {rates[-1]} "
            f"of UniGRPOConfig.single_gpu() was chosen for 2: pass LoraConfig(r={r}, lora_alpha={2 * r}), or a higher "
            "rate."
        )


def default_config(source: str) -> UniGRPOConfig:
    """Make the configuration of a user who gives none, for a model from this folder or repository."""
    return UniGRPOConfig(f"{(source or 'model').split('/')[-1]}-UniGRPO")


def load_for_training(
    source: str, args: UniGRPOConfig, quantization_config: Any, peft_config: PeftConfig | None
) -> tuple[PreTrainedModel, UniGRPOConfig]:
    """
    Load a model by name, with adapters if the name is of such.

    Its dtype is float32 if its weights are trained: in bfloat16 small updates would round to nothing.

    Returns:
        The model, and a copy of the configuration without the arguments that went into loading it.

    Raises:
        ValueError: before weights are read, if adapters would go to the wrong place or quantised weights be trained.
    """
    given = args.model_init_kwargs or {}
    saved = saved_adapters(source, **given)
    adapted = peft_config is not None or saved is not None
    kwargs = {"dtype": torch.bfloat16 if args.bf16 and adapted else torch.float32, **given}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if kwargs.get("quantization_config") is not None:
        if not adapted:
            raise ValueError(
                "quantization_config without peft_config: quantised weights can't be trained, only adapters on them. "
                "Pass peft_config=LoraConfig(r=32, lora_alpha=64) (--use_peft on the command line), or leave the "
                "quantisation out."
            )
        kwargs.setdefault("device_map", {"": args.device})
    if saved is None and getattr(peft_config, "target_modules", None) is not None:
        check_targets(peft_config, unified_model(model_skeleton(source, **kwargs)))
    args = copy.copy(args)
    args.model_init_kwargs = None
    return load_trainable(source, peft_config, **kwargs), args


def of_revision(peft_config: PeftConfig | None, revision: str | None) -> PeftConfig | None:
    """Note in a copy of the adapters' configuration which revision of the base model they are trained on."""
    if peft_config is None or revision is None:
        return peft_config
    peft_config = copy.copy(peft_config)
    peft_config.revision = revision
    return peft_config


def find_tokenizer(
    base: UnifiedModelMixin, processing_class: PreTrainedTokenizerBase | None, source: str | None, **hub: Any
) -> PreTrainedTokenizerBase:
    """
    Get a model's tokenizer ready: the one given, the model's own, or that of the folder or repository `source`.

    Args:
        hub: where in the repository, such as `revision`.

    Raises:
        ValueError: if there is none, or it is not this model's.
    """
    tokenizer = processing_class or base.tokenizer
    if not (tokenizer or source):
        raise ValueError(
            "processing_class is missing, and the model does not say where it was loaded from. Pass a tokenizer."
        )
    tokenizer = prepare_tokenizer(tokenizer or read_tokenizer(source, **hub), base.chat_template)
    base.check_tokenizer(tokenizer)
    return tokenizer
