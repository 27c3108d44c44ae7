"""Find the class of a unified model by its name, and check that a model is one."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from .contract import UnifiedModelMixin
from .hub import hub_arguments


def load_unified_model(source: str, **kwargs: Any) -> PreTrainedModel:
    """
    Load a unified model from a folder or a hub id.

    BAGEL is known by its `llm_config.json`; other models are found through transformers' auto classes, where a third
    party registers its own with `AutoModelForCausalLM.register`. Never runs code from a repository.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: for `trust_remote_code`, and for an argument that the model can't follow.
    """
    check_folder(source)
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code=True: code of a repository is never run. Register the model's class with "
            "AutoModelForCausalLM.register, and leave the option out."
        )
    if kwargs.get("revision") not in (None, "main") and Path(source).is_dir():
        warnings.warn(f"revision={kwargs['revision']!r} is ignored: {source!r} is a folder, which has no revisions.")
    from . import pipeline  # noqa: F401 - registers its classes
    from .bagel import BagelForUnifiedGeneration

    if _is_released_bagel(source, hub_arguments(kwargs)):
        return BagelForUnifiedGeneration.from_pretrained(source, **kwargs)
    return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **kwargs)


def check_folder(source: str) -> None:
    """Raise FileNotFoundError for the path of a folder that is not there."""
    if str(source).startswith(("/", "./", "../", "~")) and not Path(source).is_dir():
        raise FileNotFoundError(f"{str(source)!r}: no such folder. Pass the folder or the hub id of a model.")


def model_skeleton(source: str, **kwargs: Any) -> PreTrainedModel:
    """
    Build the modules of what [`load_unified_model`] would load, on the meta device: no weights are read. Only
    pipelines are loaded, as they have no other form.
    """
    from .bagel import BagelConfig, BagelForUnifiedGeneration
    from .pipeline import PipelineUnifiedConfig

    hub = hub_arguments(kwargs)
    with torch.device("meta"):
        if _is_released_bagel(source, hub):
            return BagelForUnifiedGeneration(BagelConfig.from_pretrained(source, **hub))
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
        if not isinstance(config, PipelineUnifiedConfig):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return load_unified_model(source, **kwargs)


def _is_released_bagel(source: str, hub: dict[str, Any]) -> bool:
    return cached_file(source, "llm_config.json", _raise_exceptions_for_missing_entries=False, **hub) is not None


def unified_model(model: Any) -> UnifiedModelMixin:
    """
    Get the unified model inside a possibly adapted one.

    Raises:
        TypeError: if there is none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, UnifiedModelMixin):
        raise TypeError(
            f"{type(base).__name__} is not a unified model: it paints no images. Pass a model that implements "
            "trl_unigrpo.models.contract.UnifiedModelMixin, such as BagelForUnifiedGeneration."
        )
    return base
