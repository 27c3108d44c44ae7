"""Strict loading of BAGEL checkpoints: safetensors only, one readable error for whatever does not fit."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from ..hub import hub_arguments
from ..quantization import keep_trainable_layout, ready_to_quantize
from .autoencoder import AUTOENCODER_WEIGHTS, LatentCodec
from .configuration import RELEASED_WEIGHTS
from .vision import UNDERSTANDING_MODULES


# Heads, embedders and the understanding tower: a hundredth of the weights, and the most sensitive ones.
UNQUANTIZED = ("lm_head", "vit_model", "connector", "time_embedder", "vae2llm", "llm2vae")


def load_checkpoint(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """
    Load weights through transformers' `load`, and the VAE beside them; refuse a checkpoint that does not fit.

    A checkpoint without any weight of the understanding tower gives a model without the tower, and a warning.
    """
    kwargs.pop("trust_remote_code", None)
    wants_info = kwargs.pop("output_loading_info", False)
    if kwargs.get("quantization_config") is not None:
        quantization, dtype = kwargs["quantization_config"], kwargs.get("dtype")
        kwargs["quantization_config"] = ready_to_quantize(quantization, UNQUANTIZED, dtype)
    strict = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with without_load_report():
            model, info = load(source, *args, **{**kwargs, **strict})
        drop_absent_tower(source, model, info)
        check_keys(source, info)
        keep_trainable_layout(model)
        file = cached_file(
            source, AUTOENCODER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs)
        )
        if file is not None:
            model.codec = LatentCodec.load(file, model.config.vae_config, model.config.latent_patch_size)
    except FileNotFoundError as error:
        if RELEASED_WEIGHTS not in str(error):
            raise
        raise FileNotFoundError(
            f"{str(source)!r} has no `{RELEASED_WEIGHTS}`, the weights of a released BAGEL. Download the checkpoint "
            "again, or pass a folder written by `save_pretrained`."
        ) from error
    except SafetensorError as error:
        raise OSError(
            f"A weights file of {str(source)!r} is damaged or incomplete ({error}). Download it again; a file of a "
            "few hundred bytes is a pointer that git-lfs has not replaced."
        ) from error
    model.freeze_understanding()  # loading switches `requires_grad` on
    return (model, info) if wants_info else model


@contextmanager
def without_load_report() -> Iterator[None]:
    """Silence transformers' table of keys that don't fit: [`check_keys`] says it, and more briefly."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)


def drop_absent_tower(source: Any, model: Any, info: dict[str, Any]) -> None:
    """Take the understanding tower out of a model whose checkpoint has no weight of it: better none than random."""
    tower = set(understanding_keys(model.state_dict()))
    if not tower or not tower <= set(info["missing_keys"]):
        return
    for name in UNDERSTANDING_MODULES:
        setattr(model, name, None)
    model.config.vit_config = None
    info["missing_keys"] = set(info["missing_keys"]) - tower
    warnings.warn(
        f"The weights in {str(source)!r} have no understanding tower ({', '.join(UNDERSTANDING_MODULES)}): this model "
        "can think and paint, but it can't read images, so neither answer questions about them nor edit them. For "
        "that, load a complete checkpoint.",
        stacklevel=4,
    )


def understanding_keys(names: Iterable[str]) -> list[str]:
    """Choose the keys that belong to the understanding tower, its connector or its position table."""
    return [name for name in names if name.split(".")[0] in UNDERSTANDING_MODULES]


def check_keys(source: Any, info: dict[str, Any]) -> None:
    """Raise ValueError, naming them, if keys are missing, left over or of another shape."""
    mismatched = [f"{name} {tuple(stored)} instead of {tuple(own)}" for name, stored, own in info["mismatched_keys"]]
    kinds = {"missing": info["missing_keys"], "left over": info["unexpected_keys"], "of another shape": mismatched}
    problems = [f"{len(names)} {kind}: {listing(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"The weights in {str(source)!r} are not those of its configuration: {'; '.join(problems)}. "
            + remedy(info)
        )


def remedy(info: dict[str, Any]) -> str:
    """Say what to do about keys that do not fit."""
    mismatched = {name: (stored[0], own[0]) for name, stored, own in info["mismatched_keys"] if stored and own}
    sizes = mismatched.get("language_model.lm_head.weight")
    left_over, missing = set(info["unexpected_keys"]), info["missing_keys"]
    if sizes and sizes[0] != sizes[1]:
        return (
            f"The weights have a vocabulary of {sizes[0]}, the configuration of {sizes[1]}: correct `vocab_size` in "
            "`llm_config.json`, or take the file that belongs to these weights."
        )
    if left_over and not missing and not mismatched and left_over == set(understanding_keys(left_over)):
        return (
            "These belong to the understanding tower, which the configuration describes otherwise or not at all: put "
            "the `vit_config.json` of these weights into the folder."
        )
    return "Check that the folder is complete and that its configuration files belong to these weights."


def listing(names: Any, limit: int = 6) -> str:
    """List the first names in order, and say how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
