"""Strict loading of BAGEL checkpoints: safetensors only, one readable error for whatever does not fit."""

from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from ..quantization import keep_trainable_layout, ready_to_quantize
from .autoencoder import AUTOENCODER_WEIGHTS, LatentCodec
from .configuration import hub_arguments


# Heads, embedders and the understanding tower: a hundredth of the weights, and the most sensitive ones.
UNQUANTIZED = ("lm_head", "vit_model", "connector", "time_embedder", "vae2llm", "llm2vae")


def load_checkpoint(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """Load weights through transformers' `load`, and the VAE beside them; refuse a checkpoint that does not fit."""
    kwargs.pop("trust_remote_code", None)
    wants_info = kwargs.pop("output_loading_info", False)
    if kwargs.get("quantization_config") is not None:
        quantization, dtype = kwargs["quantization_config"], kwargs.get("dtype")
        kwargs["quantization_config"] = ready_to_quantize(quantization, UNQUANTIZED, dtype)
    strict = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = load(source, *args, **{**kwargs, **strict})
        report(source, info)
        keep_trainable_layout(model)
        file = cached_file(
            source, AUTOENCODER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs)
        )
        if file is not None:
            model.codec = LatentCodec.load(file, model.config.vae_config, model.config.latent_patch_size)
    except SafetensorError as error:
        raise OSError(
            f"A weights file of {str(source)!r} is damaged or incomplete ({error}). Download it again; a file of a "
            "few hundred bytes is a pointer that git-lfs has not replaced."
        ) from error
    return (model, info) if wants_info else model


def report(source: Any, info: dict[str, Any]) -> None:
    """Raise ValueError, naming them, if keys are missing, left over or of another shape."""
    mismatched = [f"{name} {tuple(stored)} instead of {tuple(own)}" for name, stored, own in info["mismatched_keys"]]
    kinds = {"missing": info["missing_keys"], "left over": info["unexpected_keys"], "of another shape": mismatched}
    problems = [f"{len(names)} {kind}: {listing(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"The weights in {str(source)!r} are not those of its configuration: {'; '.join(problems)}. Check that "
            "the folder is complete and that its configuration files belong to these weights."
        )


def listing(names: Any, limit: int = 6) -> str:
    """The first names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
