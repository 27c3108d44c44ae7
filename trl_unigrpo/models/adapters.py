"""Adapters: of which kinds they may be, where they go, in which precision they are kept and sampled with."""

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import CONFIG_NAME
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    get_pattern_key,
)
from torch import Tensor, nn
from transformers.utils import cached_file

from .contract import UnifiedModelMixin
from .hub import hub_arguments
from .registry import check_folder, load_unified_model, unified_model


def target_experts(peft_config: PeftConfig | None, model: Any, trains: Mapping[str, bool]) -> PeftConfig | None:
    """The adapters' configuration, checked; without `target_modules` they go to the experts that are trained."""
    if peft_config is None:
        return None
    check_kind(peft_config)
    base = unified_model(model)
    if getattr(peft_config, "target_modules", ...) is None:
        experts = "both" if all(trains.values()) else next(name for name, on in trains.items() if on)
        peft_config = copy.deepcopy(peft_config)
        peft_config.target_modules = base.default_lora_targets(experts)
    check_targets(peft_config, base)
    return peft_config


def check_kind(peft_config: PeftConfig) -> None:
    """Raise ValueError for prompt learning, which trains vectors beside the model and none of its weights."""
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError(
            f"peft_config: {type(peft_config).__name__} is prompt learning. Its vectors stand before the text alone, "
            "outside of the unified model, which paints without them. Use adapters of weights, such as "
            "LoraConfig(r=32, lora_alpha=64)."
        )


def merge_found_adapters(model: nn.Module) -> None:
    """
    Make adapters that a model's parts came with a part of their weights, in place: a style of the painter, or those
    of an earlier run.

    Beside them PEFT would freeze nothing, switch them off where a new adapter goes, and overwrite one of its name.
    """
    names: set[str] = set()
    places: list[str] = []
    for path, layer in list(model.named_modules()):
        if any(path.startswith(f"{place}.") for place in places):
            continue  # inside of a layer that was replaced
        if isinstance(layer, AuxiliaryTrainingWrapper):
            merged = layer.unload_and_optionally_merge_module(not layer.disable_adapters, False, adapter_names=None)
        elif isinstance(layer, BaseTunerLayer):
            if not layer.disable_adapters:
                layer.merge()
            merged = layer.get_base_layer()
        else:
            continue
        names.update(layer.active_adapters)
        places.append(path)
        model.set_submodule(path, merged)
    if not places:
        return
    for module in model.modules():
        for mark in ("peft_config", "_hf_peft_config_loaded"):  # PEFT's, transformers' and diffusers'
            vars(module).pop(mark, None)
    warnings.warn(
        f"The model's parts came with adapters ({', '.join(map(repr, sorted(names)))}). They are merged into its "
        "weights: training starts from them, and what is saved of it goes on top of them."
    )


def check_targets(peft_config: PeftConfig, base: UnifiedModelMixin) -> None:
    """
    Raise ValueError for names in `target_modules`, `modules_to_save`, `target_parameters`, `rank_pattern` or
    `alpha_pattern` that match nothing, and for modules that belong to neither expert.

    Only the names of the model's modules are looked at: weights may be on the meta device.
    """
    remedy = (
        "Leave target_modules unset, and adapters go to the linear layers of the experts that are trained; or pass a "
        f"regular expression of whole names, such as {base.default_lora_targets('both')!r}."
    )
    targets = getattr(peft_config, "target_modules", None)
    adapted = matched_modules(peft_config, base) if targets is not None else []
    if isinstance(targets, str):
        lost = [] if adapted else [targets]
    else:
        lost = [target for target in targets or [] if not _ends_in(adapted, target)]
    if lost:
        raise ValueError(f"peft_config: target_modules {_listing(lost)} match no module of the model. {remedy}")

    for field, kind in (("modules_to_save", "module"), ("target_parameters", "parameter")):
        names = [name for name, _ in getattr(base, f"named_{kind}s")()]
        lost = [name for name in getattr(peft_config, field, None) or [] if not _ends_in(names, name)]
        if lost:
            raise ValueError(
                f"peft_config: {field} {_listing(lost)} match no {kind} of the model. Take the names from "
                f"model.named_{kind}s()."
            )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(peft_config, field, None) or {}
        lost = [key for key in patterns if targets and all(get_pattern_key([key], name) != key for name in adapted)]
        if lost:
            raise ValueError(
                f"peft_config: {field} {_listing(lost)} match none of the adapted modules, which are "
                f"{_listing(adapted)}. A key is the end of a module's name, or a regular expression of all of it."
            )

    frozen = [name for name in adapted if name.split(".")[0] in base.frozen_modules]
    if frozen:
        raise ValueError(
            f"peft_config: target_modules match {len(frozen)} modules of {' and '.join(base.frozen_modules)}, which "
            f"are not trained: {_listing(frozen)}. {remedy}"
        )


def matched_modules(peft_config: PeftConfig, base: UnifiedModelMixin) -> list[str]:
    """Names of the modules that `target_modules` match, as PEFT understands it."""
    modules = dict(base.named_modules())
    if str(peft_config.target_modules).lower() == "all-linear":
        head = base.get_output_embeddings()
        peft_config = copy.copy(peft_config)
        peft_config.target_modules = {
            name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head
        }
    return [name for name in modules if name and check_target_module_exists(peft_config, name)]


def _ends_in(names: Collection[str], ending: str) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for name in names)


def _listing(names: Collection[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(map(repr, list(names)[:limit]))
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def saved_adapters(source: str, **kwargs: Any) -> PeftConfig | None:
    """
    Read the configuration of the adapters in a folder or hub repository; None if it holds a whole model.

    Args:
        source: a folder or hub id.
        kwargs: of `from_pretrained`.
    """
    check_folder(source)
    hub = hub_arguments(kwargs)
    if cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub) is None:
        return None
    return PeftConfig.from_pretrained(source, **hub)


def load_trainable(source: str, peft_config: PeftConfig | None, **kwargs: Any) -> Any:
    """
    Load a model by name; where it holds adapters, their base with them, to go on training these.

    Args:
        source: a folder or hub id.
        peft_config: of the adapters that are asked for.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: if the saved adapters are others than those asked for, or don't name their base.
    """
    saved = saved_adapters(source, **kwargs)
    if saved is None:
        return load_unified_model(source, **kwargs)
    remedy = (
        "To go on training them, leave peft_config out (--use_peft). To train others, merge these into their base "
        "first: trl-unigrpo merge."
    )
    for name in ("peft_type", "r", "lora_alpha"):
        mine, theirs = (getattr(config, name, None) for config in (peft_config, saved))
        if peft_config is not None and mine != theirs:
            raise ValueError(f"{source!r} holds adapters with {name}={theirs}, but peft_config has {mine}. {remedy}")
    if not saved.base_model_name_or_path:
        raise ValueError(
            f"The adapters in {source!r} don't say what they were trained on. Load that, and pass "
            f"PeftModel.from_pretrained(model, {source!r}, is_trainable=True)."
        )
    if peft_config is not None:
        warnings.warn(f"{source!r} holds adapters: training goes on with them. peft_config is not used.")
    below = {key: value for key, value in kwargs.items() if key != "revision"}
    model = load_unified_model(saved.base_model_name_or_path, **below)
    return PeftModel.from_pretrained(model, source, is_trainable=True, **hub_arguments(kwargs))


def check_own_adapters(model: Any) -> None:
    """Raise ValueError for adapters that transformers put into a model, where PEFT doesn't see them."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model holds adapters that from_pretrained or load_adapter put into it, where they can't be trained. "
            "Load its base, and pass PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )


def keep_adapters_in_float32(model: nn.Module, masters: Mapping[str, Tensor]) -> None:
    """
    Hold adapters in float32, whatever the base has: in bfloat16 small updates would round to nothing.

    Args:
        model: the adapted model.
        masters: weights of adapters that the user brought, from before TRL rounded those on a quantised base.
    """
    for name, parameter in model.named_parameters():
        if name in masters and parameter.dtype != masters[name].dtype:
            parameter.data = masters[name].to(parameter.device)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for layers in (getattr(module, name) for name in module.adapter_layer_names):
                for parameter in layers.parameters():
                    if parameter.dtype in (torch.bfloat16, torch.float16):
                        parameter.data = parameter.data.float()
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = OutsideAutocast()


def merged_weights(
    module: Any, left_out: Callable[[str], bool], prefix: str = "", seen: set[Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """
    Yield a module's parameters with its adapters merged into them, by the names that they have without adapters; tied
    ones once.

    Layers are merged one by one, and get their own numbers back to the bit. PEFT's way back is to subtract, which
    rounds: frozen weights would drift.

    Args:
        left_out: says of a name whether it is not wanted.
        prefix: of all names.
        seen: parameters that are not to be yielded again.

    Raises:
        ValueError: for an adapter of one of two tied layers, which no one weight can stand for.
    """
    seen = set() if seen is None else seen
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    elif isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    adapted = isinstance(module, BaseTunerLayer)
    own = module.get_base_layer() if adapted else module
    if isinstance(module, LoraLayer) and any(parameter in seen for parameter in own.parameters()):
        raise ValueError(f"{prefix} is adapted and tied to another layer: leave it out of target_modules.")
    found = {name: p for name, p in own.named_parameters(prefix, recurse=adapted) if p not in seen}
    wanted = [name for name in found if not left_out(name)]
    seen.update(found.values())
    with _merged(module, own) if adapted and wanted else nullcontext():
        weights = [(name, found[name].detach().clone() if adapted else found[name].detach()) for name in wanted]
    yield from weights
    for name, child in () if adapted else module.named_children():
        yield from merged_weights(child, left_out, f"{prefix}.{name}" if prefix else name, seen)


@contextmanager
def _merged(layer: nn.Module, base: nn.Module) -> Iterator[None]:
    """Merge the adapters of a layer into its base layer for a while."""
    tuners = [part for part in layer.modules() if isinstance(part, BaseTunerLayer) and not part.disable_adapters]
    before = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
    with torch.no_grad():
        try:
            for tuner in tuners:
                tuner.merge()
            yield
        finally:
            for tuner in reversed(tuners):
                tuner.unmerge()
            for parameter, value in before:
                parameter.data.copy_(value)


class OutsideAutocast:
    """
    A switch that is on outside of autocast.

    PEFT brings an adapter's input to the adapter's float32, and autocast brings it back to half precision for the
    product: the same numbers, for a fifth of the GPU's time in a training step of BAGEL. Inside of autocast, then,
    PEFT is not to cast.
    """

    def __bool__(self) -> bool:
        return not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"))
