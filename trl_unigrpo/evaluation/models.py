"""Any model by name: a released folder or hub id, a checkpoint, an adapter, a pipeline; and its weights' digest."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from ..models.contract import UnifiedModelMixin
from ..models.pipeline.configuration import PipelineUnifiedConfig
from ..models.pipeline.loading import hardware_dtype, local_folder
from ..models.pipeline.saving import ADAPTERS
from ..models.registry import load_unified_model, unified_model
from ..models.tokenizer import read_tokenizer


ADAPTER = "adapter_config.json"
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
COUNTED = ("F64", "I64", "BOOL")
"""Dtypes of buffers that a model may have beside its weights, none of them of a quantised weight."""
HASHED_BYTES = 2 * 2**30
"""Weights of more bytes are known by the names and sizes of their files."""


def load_model(
    source: str | None,
    *,
    base: str | None = None,
    thinker: str | None = None,
    painter: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Load a model that thinks and paints, and its tokenizer.

    Args:
        source: "shapeworld" for the built-in one; a folder or hub id of a model, or a folder with PEFT's adapters.
        base: what adapters were trained on, where their own folder does not say or it has moved.
        thinker, painter: a language model and a diffusers pipeline instead of a model, or below adapters.
        dtype: of the weights; "auto" is bfloat16 where the hardware has it, else float32.
        device: by default a GPU if there is one.

    Raises:
        OSError, ValueError: if there is no such model, with what to pass.
    """
    if source is None and painter is None:
        raise ValueError("There is no model: pass its folder or hub id, or painter=... .")
    kwargs: dict[str, Any] = {"dtype": hardware_dtype() if dtype == "auto" else _dtype(dtype)}
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if source is not None and not is_adapter(source):
        if any(part is not None for part in (base, thinker, painter)):
            raise ValueError(f"{source!r} is a whole model: base, thinker and painter belong to a folder of adapters.")
        source = _named(source)
        model = load_unified_model(source, **kwargs)
        _check_paints(model, f"{source!r} is")
        return model.to(where).eval(), _tokenizer(model, source)
    parts = parts_of(source, base, thinker, painter)
    if "painter" in parts:
        from ..models.pipeline import PipelineForUnifiedGeneration

        halves: dict[str, Any] = {name: parts.get(name) for name in ("thinker", "painter")}
        config = None if source is None else pipeline_of(source)
        if config is not None:
            config.sources = {}  # of those that are loaded now
        model = PipelineForUnifiedGeneration.from_pretrained(**halves, config=config, **kwargs)
        tokenizer = model.tokenizer
    else:
        below = _named(parts["base"])
        revision = base_revision(source) if base is None else None
        model = load_unified_model(below, **kwargs, **({"revision": revision} if revision else {}))
        _check_paints(model, f"The adapters in {source!r} were trained on {below!r},")
        tokenizer = _tokenizer(model, below, str(source), revision)
    if source is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source)
    return model.to(where).eval(), tokenizer


def parts_of(source: str | None, base: str | None, thinker: str | None, painter: str | None) -> dict[str, str]:
    """
    Name the parts of a model by [`load_model`]'s arguments; of adapters also what they sit on.

    Raises:
        ValueError: if adapters don't say that, with what to pass.
    """
    if source is not None and is_adapter(source) and base is None:
        config = pipeline_of(source)
        if config is not None:
            painter = painter or _half(config, "painter", source)
            thinker = thinker or (None if config.shared_encoder else _half(config, "thinker", source))
        elif painter is None:
            base = _base_of(source)
    if thinker is not None and painter is None:
        raise ValueError(f"thinker={thinker!r} without a painter paints nothing. Pass painter=... too (--painter).")
    given = {"source": source, "base": base, "thinker": thinker, "painter": painter}
    return {name: part for name, part in given.items() if part is not None}


def _check_paints(model: Any, found: str) -> None:
    if not isinstance(model, UnifiedModelMixin):
        raise ValueError(
            f"{found} a {type(model).__name__}, which paints no images. To paint with a pipeline of diffusers, pass "
            "painter=... and thinker=... (--painter P --thinker T)."
        )


def is_adapter(source: str) -> bool:
    return (Path(source) / ADAPTER).is_file()


def pipeline_of(source: str) -> PipelineUnifiedConfig | None:
    """Read what adapters of a pipeline were trained on, where that was put together from a thinker and a painter."""
    folder = Path(source) / ADAPTERS
    if not (folder / "config.json").is_file():
        return None
    config = PipelineUnifiedConfig.from_pretrained(folder)
    config.name_or_path = ""  # the folder holds no model
    return config


def _half(config: PipelineUnifiedConfig, part: str, source: str) -> str:
    name = config.sources.get(part, "")
    if not name or (Path(name).is_absolute() and not Path(name).exists()):
        lost = f"{name!r}, which is gone" if name else "one without a name"
        raise ValueError(
            f"The adapters in {source!r} were trained on a {part} from {lost}: pass painter=... and thinker=... "
            "(--painter P --thinker T)."
        )
    return name


def base_revision(source: str | None) -> str | None:
    """Name the revision of the base model that adapters were trained on; None for its latest, or without adapters."""
    return _adapter_config(source).get("revision") if source is not None and is_adapter(source) else None


def _adapter_config(source: str) -> dict[str, Any]:
    return json.loads((Path(source) / ADAPTER).read_text(encoding="utf-8"))


def _base_of(source: str) -> str:
    base = _adapter_config(source).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"The adapters in {source!r} do not say what they were trained on: pass base=... .")
    return base


def _named(source: str) -> str:
    if source != "shapeworld":
        return source
    from ..shapeworld.base import BASE

    return str(BASE)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={name!r}: expected auto, float32, bfloat16 or float16.")
    return found


def _tokenizer(
    model: Any, source: str, adapters: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Find the tokenizer of a model, beside its weights or the adapters on them."""
    try:
        return unified_model(model).tokenizer or read_tokenizer(source, revision=revision or "main")
    except OSError:
        if adapters is None:
            raise
        return read_tokenizer(adapters)


def fingerprint(source: str, revision: str | None = None) -> dict[str, Any]:
    """
    Give what a model's weights are known by: a digest of all weight files of a folder, of their names and sizes where
    they are more than 2 GiB, or the commit of a hub repository's `revision` where the cache knows it.
    """
    folder = Path(_named(source))
    if not folder.is_dir():
        return {"source": source, "revision": _commit(source, revision)}
    files = weight_files(folder)
    digest = hashlib.sha256()
    whole = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        if whole:
            with file.open("rb") as data:
                digest.update(hashlib.file_digest(data, "sha256").digest())
    return {"weights_sha256" if whole else "files_sha256": digest.hexdigest()[:16]}


def weight_files(folder: Path) -> list[Path]:
    """List the files of a model's weights, without those of checkpoints in the same folder, which are other models."""
    return sorted(
        file
        for file in folder.rglob("*.safetensors")
        if not any(part.startswith("checkpoint-") for part in file.relative_to(folder).parts)
    )


def stored_dtype(sources: Iterable[str]) -> str:
    """
    Name the dtype in which most numbers of a model's parts are stored.

    Raises:
        ValueError: if a part is quantised.
    """
    numbers = dict.fromkeys(FLOATS, 0)
    for source in sources:
        for file in weight_files(local_folder(_named(source))):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - the file is no dictionary
                    found = weights.get_slice(name)
                    if found.get_dtype() not in (*FLOATS, *COUNTED):
                        raise ValueError(
                            f"{source!r} is quantised ({name} is stored as {found.get_dtype()}): what is added to its "
                            "weights would be rounded away. Pass the unquantised model that it was made from as base."
                        )
                    if found.get_dtype() in FLOATS:
                        numbers[found.get_dtype()] += math.prod(found.get_shape())
    return FLOATS[max(numbers, key=lambda kind: numbers[kind])]


def _commit(source: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    for name in ("config.json", "llm_config.json", "model_index.json"):
        where = {"revision": revision or "main", "local_files_only": True}
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
        if file is not None:
            return extract_commit_hash(file, None)
    return None
