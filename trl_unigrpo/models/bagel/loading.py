"""Strict loading of BAGEL checkpoints: safetensors only, one readable error for whatever does not fit."""

from collections.abc import Callable
from typing import Any

from transformers.utils import cached_file

from .autoencoder import AUTOENCODER_WEIGHTS, LatentCodec


def load_checkpoint(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """Load the weights through transformers' `load` and the VAE beside them, and refuse a checkpoint that does not fit."""
    kwargs.pop("trust_remote_code", None)
    wants_info = kwargs.pop("output_loading_info", False)
    hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if kwargs.get(key)}
    model, info = load(
        source, *args, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    report(source, info)
    file = cached_file(source, AUTOENCODER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub)
    if file is not None:
        model.codec = LatentCodec.load(file, model.config.vae_config, model.config.latent_patch_size)
    return (model, info) if wants_info else model


def report(source: Any, info: dict[str, Any]) -> None:
    """Raise ValueError, naming them, if keys are missing, left over or of another shape."""
    problems = []
    for key, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "left over"),
        ("mismatched_keys", "of another shape"),
    ):
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            problems.append(f"{len(names)} {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
    if problems:
        raise ValueError(
            f"The weights in {source!r} are not those of its configuration: {'; '.join(problems)}. Check that the folder is "
            "complete and that its configuration files belong to these weights."
        )
