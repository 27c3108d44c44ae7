"""A run in words and numbers, for pages and cards."""

from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from ..__about__ import versions
from ..models.registry import unified_model


SETTINGS = (
    "num_generations",
    "num_iterations",
    "generation_batch_size",
    "learning_rate",
    "image_learning_rate",
    "text_weight",
    "flow_weight",
    "process_reward_weight",
    "image_objective",
    "flow_epsilon",
    "flow_regularizer",
    "flow_regularizer_weight",
    "beta",
    "image_size",
    "num_inference_steps",
    "guidance_scale",
    "noise_level",
    "sde_type",
    "sde_window_range",
    "sde_window_size",
    "timestep_shift",
    "thinking",
    "max_completion_length",
    "temperature",
    "seed",
)


ROUND_SETTINGS = (
    "num_rounds",
    "round_context",
    "round_group",
    "round_select",
    "keep_perfect",
    "round_reward",
    "round_baseline",
    "round_cost",
    "no_improve",
    "allow_stop",
    "max_reflection_length",
)
"""Settings that count where a trajectory has several rounds."""
OPTIONAL_SETTINGS = ("eval_image_size", "image_old_policy_decay", "image_old_policy_warmup_steps", "ema_decay")
"""Settings that count where they are on."""
SCOUT_SETTINGS = ("scout_generations", "scout_num_inference_steps", "scout_reward")
"""Settings that count where there are scouts."""


def shown_settings(args: TrainingArguments) -> dict[str, Any]:
    """Give the settings of a run that pages and cards show."""
    names = SETTINGS + (ROUND_SETTINGS if getattr(args, "num_rounds", 1) > 1 else ())
    names += SCOUT_SETTINGS if getattr(args, "scout_generations", None) else ()
    names += tuple(name for name in OPTIONAL_SETTINGS if getattr(args, name, None))
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def describe_run(model: Any, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Describe what is trained, and with which settings, in JSON's types."""
    return {
        "method": "UniGRPO",
        "model": model_name(model),
        "trained": trained_parameters(model),
        "max_steps": state.max_steps,
        "alarms": getattr(args, "alarms", "off"),
        "settings": shown_settings(args),
        "versions": versions(),
    }


def model_name(model: Any) -> str:
    """Name the models that it was made of; of folders their last names; its class where it was made from nothing."""
    return " + ".join(map(short_name, base_models(model))) or type(unified_model(model)).__name__


def base_models(model: Any) -> list[str]:
    """Return the hub ids or folders of the models that it was made of: its own, or those of a pipeline's parts."""
    config = unified_model(model).config
    sources = getattr(config, "sources", None) or {}
    names = [getattr(config, "_name_or_path", ""), *sources.values()]
    return list(dict.fromkeys(name for name in names if name))


def short_name(name: str) -> str:
    """Keep a hub id; of a folder return its last two names, as the rest is about a machine and not about a model."""
    return "/".join(Path(name).parts[-2:]) if is_folder(name) else name


def is_folder(name: str) -> bool:
    """Say whether a model's name is a place on a disk and no hub id."""
    return Path(name).is_absolute() or name.startswith(".") or Path(name).is_dir()


def trained_parameters(model: Any) -> str:
    """Count parameters in words, such as "adapters, 1.2 M of 14,000 M parameters"."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
    kind = "adapters, " if getattr(model, "peft_config", None) else ""
    return f"{kind}{trained / 1e6:,.3g} M of {total / 1e6:,.3g} M parameters"
