"""The two halves of a unified model, out of their folders or the hub."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig as DiffusersBitsAndBytesConfig
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from huggingface_hub import snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..hub import HUB_ARGUMENTS, hub_arguments
from ..quantization import ready_to_quantize


UNQUANTIZED_HEADS = {"thinker": ("lm_head",), "painter": ("proj_out", "norm_out")}
"""Heads: few weights, and the most sensitive ones."""

_NO_USE = ("adapter_kwargs", "device_map", "trust_remote_code", "_from_auto")
"""Arguments that transformers' auto classes and the trainer hand to every model, of no use to a pipeline."""


def local_folder(source: Any, **hub: Any) -> Path:
    """Return the folder of a unified model, downloaded if it is a hub id."""
    return Path(source) if Path(source).is_dir() else Path(snapshot_download(source, **hub))


def hardware_dtype() -> torch.dtype:
    """Return bfloat16 where the hardware computes in it, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def hub_alone(arguments: dict[str, Any]) -> dict[str, Any]:
    """Choose the arguments that say where on the hub a model lies; TypeError for one that neither half would get."""
    for name, value in arguments.items():
        if name not in (*HUB_ARGUMENTS, *_NO_USE):
            raise TypeError(f"{name}={value!r} does nothing for a pipeline. Leave it out.")
    return hub_arguments(arguments)


def load_thinker(source: Any, dtype: torch.dtype, quantization: Any = None, **hub: Any) -> PreTrainedModel | None:
    """Load a causal language model, or the language half of a model that also reads images; None for None."""
    if source is None or isinstance(source, PreTrainedModel):
        return source
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True, **hub}
    if quantization is not None:
        kwargs["quantization_config"] = ready_to_quantize(quantization, UNQUANTIZED_HEADS["thinker"], dtype)
    try:
        thinker = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        thinker = AutoModelForImageTextToText.from_pretrained(source, **kwargs)
    return thinker


def load_painter(source: Any, dtype: torch.dtype, quantization: Any = None, thinks: bool = False, **hub: Any) -> Any:
    """
    Load a diffusers pipeline.

    Args:
        thinks: whether its text encoder is to be the thinker, and quantised like one.

    Raises:
        ImportError: with the remedy, if it needs torchvision and that is missing.
    """
    if not isinstance(source, (str, Path)):
        return source
    kwargs: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **hub}
    if quantization is not None:
        kwargs["quantization_config"] = painter_quantization(quantization, dtype, thinks)
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, **kwargs)
    except (ImportError, NameError) as error:
        if "torchvision" not in str(error).lower() and not isinstance(error, NameError):
            raise
        raise ImportError(
            f"The pipeline in {str(source)!r} needs a package that is not installed, torchvision most often "
            f"({error}). Install the torchvision that belongs to your torch, or take another pipeline."
        ) from error
    return pipeline


def painter_quantization(quantization: Any, dtype: torch.dtype, thinks: bool = False) -> Any:
    """
    Turn a `BitsAndBytesConfig` into diffusers' form, for the transformer, and the text encoder if it thinks; a
    configuration in that form stays as it is.
    """
    config = ready_to_quantize(quantization, UNQUANTIZED_HEADS["painter"], dtype)
    if not isinstance(config, BitsAndBytesConfig):
        return config
    settings = {
        name: value for name, value in config.to_dict().items() if name.startswith(("load_in_", "bnb_", "llm_"))
    }
    mapping: dict[str, Any] = {"transformer": DiffusersBitsAndBytesConfig(**settings)}
    if thinks:
        mapping["text_encoder"] = ready_to_quantize(quantization, UNQUANTIZED_HEADS["thinker"], dtype)
    return PipelineQuantizationConfig(quant_mapping=mapping)


def painters_own_thinker(pipeline: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Find the language model that a pipeline reads its prompts with, and its tokenizer.

    A text encoder without its language head gets it back where the head is the embedding's own weight.

    Raises:
        ValueError: if the pipeline has no such encoder.
    """
    for name, encoder in sorted(pipeline.components.items()):
        if not name.startswith("text_encoder") or not isinstance(encoder, PreTrainedModel):
            continue
        thinker = encoder if encoder.can_generate() and encoder.get_output_embeddings() is not None else None
        family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(encoder.config), None)
        if thinker is None and family is not None and getattr(encoder.config, "tie_word_embeddings", False):
            thinker = with_language_head(encoder, family)
        if thinker is not None:
            named = (name.replace("text_encoder", "tokenizer"), "processor")
            words = next(pipeline.components[part] for part in named if part in pipeline.components)
            return thinker, getattr(words, "tokenizer", words)
    raise ValueError(
        f"{type(pipeline).__name__} has no text encoder that is a whole language model, so that it can't think by "
        "itself. Pass a thinker, such as thinker='Qwen/Qwen3-1.7B'."
    )


def with_language_head(encoder: PreTrainedModel, family: Any) -> PreTrainedModel:
    """Build the causal language model around a bare encoder, with the encoder's own modules: no weight is copied."""
    with torch.device("meta"):
        thinker = family(copy.deepcopy(encoder.config))
    setattr(thinker, thinker.base_model_prefix, encoder)
    thinker.tie_weights()
    if thinker.get_output_embeddings().weight is not encoder.get_input_embeddings().weight:
        raise ValueError(f"The language head of {family.__name__} is not its embedding: pass a thinker of its own.")
    thinker.config._name_or_path = encoder.config._name_or_path
    return thinker
