"""Checks of a `UniGRPOConfig`: each error names the value, what was expected, and the remedy."""

import math
from collections.abc import Mapping
from typing import Any

from ..flow.per_round import PER_ROUND, of_round, of_rounds, rounds_that_differ
from .engines import settle_engine


# TRL options that cannot work here, the value that is allowed, and why. One that a release lacks needs no refusal.
_REFUSED: dict[str, tuple[Any, str]] = {
    "use_transformers_continuous_batching": (
        False,
        "it casts the whole model, adapters included, to bfloat16",
    ),
    "use_transformers_paged": (
        False,
        "it casts the whole model, adapters included, to bfloat16",
    ),
    "trust_remote_code": (
        False,
        "code of a repository is never run",
    ),
    "use_liger_kernel": (
        False,
        "it patches layers by model type and knows no unified model",
    ),
    "sync_ref_model": (
        False,
        "the velocity reference would not follow the synced text reference",
    ),
    "off_policy_mask_threshold": (
        None,
        "it masks text only: the images of masked samples would still be trained on",
    ),
    "torch_compile": (
        False,
        "it compiles the text's path alone: use compile_layers=True",
    ),
    "torch_compile_backend": (
        None,
        "it compiles the text's path alone: use compile_layers=True",
    ),
    "torch_compile_mode": (
        None,
        "it compiles the text's path alone: use compile_layers=True",
    ),
    "bf16_full_eval": (
        False,
        "it rounds the trained weights themselves, and training would go on from those",
    ),
    "fp16_full_eval": (
        False,
        "it rounds the trained weights themselves, and training would go on from those",
    ),
    "train_sampling_strategy": (
        "random",
        "rows are drawn in groups of one prompt; shuffle_dataset=False keeps the dataset's order",
    ),
    "data_seed": (
        None,
        "TRL draws the prompts by seed",
    ),
    "include_num_input_tokens_seen": (
        "no",
        "batches are lists of rows here; TRL logs num_tokens",
    ),
    "parallelism_config": (
        None,
        "the image rollout calls the model outside of the wrappers that would spread it",
    ),
    "neftune_noise_alpha": (
        None,
        "noise in the embeddings makes the first ratio differ from 1",
    ),
    "label_smoothing_factor": (0.0, "there are no labels"),
}
_ROUNDS = "later rounds are written before the model's own images, which vLLM is not given"
# What is bound where vLLM samples the thinkings, the values that it may have, and why.
_WITH_VLLM: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_rounds": ((1,), _ROUNDS),
    "eval_num_rounds": ((None, 1), _ROUNDS),
    "thinking": ((True,), "there is no thinking for vLLM to sample"),
    "vllm_structured_outputs_regex": ((None,), "log-probs are those of the whole distribution, not of what it leaves"),
}
# Options of `generate` that make the sampled distribution another than the one whose log-probs are trained, the whole
# one at `temperature`, and the values that leave it as it is. Bans of tokens are allowed.
_RESHAPING: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "logit_bias": (),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
}
# Keys of `generation_kwargs` that TRL's own reading of the sampled tokens does not know of, and what sets them.
_OF_TRL = {
    "temperature": "`temperature`",
    "eos_token_id": "`model.generation_config.eos_token_id`",
    "pad_token_id": "the tokenizer's padding token",
    "num_return_sequences": "`num_generations`",
    "return_dict_in_generate": "nothing",
    "n": "`num_generations`",
    "max_tokens": "`max_completion_length`",
    "logprobs": "nothing",
}
# Optimizers that bring parameter groups of their own, which two learning rates would break up.
_OWN_GROUPS = ("galore", "apollo", "lomo", "layerwise")

_CHOICES = {
    "sde_type": ("sde", "cps"),
    "sde_window_mode": ("contiguous", "scatter", "fixed"),
    "sde_window_scope": ("generation", "rank", "group", "sample"),
    "image_objective": ("flow_grpo", "fpo", "awm", "nft"),
    "flow_regularizer": ("velocity_mse", "latent_kl", "latent_kl_flow_grpo", "none"),
    "flow_old_source": ("recompute", "rollout"),
    "flow_context_grad": ("detach", "full"),
    "trust_checks": ("raise", "warn", "off"),
    "alarms": ("stop", "warn", "off"),
}


def check_choices(config: Any) -> None:
    """Raise ValueError for an option that is none of its choices, and for options of TRL that can't work here."""
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r}: expected one of {', '.join(map(repr, choices))}.")
    for name, (allowed, reason) in _REFUSED.items():
        value = getattr(config, name, allowed)
        if value != allowed and value:
            raise ValueError(f"{name}={value!r} does not work with UniGRPO: {reason}. Leave it at {allowed!r}.")
    for name, (allowed, reason) in _WITH_VLLM.items() if config.use_vllm else ():
        if (value := getattr(config, name)) not in allowed:
            raise ValueError(f"use_vllm=True with {name}={value!r} does not work: {reason}. Leave one of the two out.")
    settle_engine(config, shards=True)
    if "inputs" in (getattr(config, "include_for_metrics", None) or []):
        raise ValueError("include_for_metrics=['inputs'] does not work: batches are lists of rows here.")
    optim = getattr(config.optim, "value", str(config.optim))
    if any(name in optim for name in _OWN_GROUPS):
        raise ValueError(
            f"optim={optim!r} brings its own parameter groups, which the two learning rates would break up. "
            "Use an AdamW variant, adafactor or sgd."
        )


def check_sampling(config: Any) -> None:
    """
    Raise ValueError for options of `generate` that TRL's log-probs know nothing of: thinkings would be sampled from
    another distribution than the one that is trained.
    """
    _check_reshaping({name: getattr(config, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}, "")
    extra = config.generation_kwargs or {}
    _check_reshaping(extra, "generation_kwargs: ")
    for name, setter in _OF_TRL.items():
        if name in extra and extra[name] != getattr(config, name, None):
            raise ValueError(
                f"generation_kwargs: {name}={extra[name]!r} does not work with UniGRPO: TRL would read what is "
                f"sampled as if it weren't there. It is set by {setter}; leave it out."
            )
    if config.cache_implementation == "paged" or extra.get("cache_implementation") == "paged":
        raise ValueError(
            "cache_implementation='paged' does not work with UniGRPO: it stands for continuous batching, which casts "
            "the whole model to bfloat16. Leave it out, or use 'static'."
        )


def check_generation(generation_config: Any, overridden: Mapping[str, Any]) -> None:
    """Raise ValueError for such options in a model's own `generation_config`, which `generate` takes over."""
    own = {name: getattr(generation_config, name, None) for name in _RESHAPING if name not in overridden}
    _check_reshaping(own, "model.generation_config: ")


def _check_reshaping(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        if name in _RESHAPING and value is not None and value not in _RESHAPING[name]:
            neutral = (*_RESHAPING[name], None)[0]
            raise ValueError(
                f"{where}{name}={value!r} does not work with UniGRPO: log-probs are those of the whole distribution "
                f"at `temperature`, so what is sampled would not be what is trained. Set it to {neutral!r}."
            )


def check_values(config: Any) -> None:
    """Raise ValueError for numbers out of their range, and for settings that contradict one another."""
    for name in (
        "image_batch_size",
        "max_completion_length",
        "num_inference_steps",
        "eval_num_inference_steps",
        "timestep_shift",
        "matching_samples",
        "nft_beta",
        "flow_epsilon",
        "learning_rate",
        "image_learning_rate",
    ):
        for value in of_rounds(config, name):
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: expected a positive number.")
    for name in (
        "text_weight",
        "flow_weight",
        "flow_regularizer_weight",
        "noise_level",
        "process_reward_weight",
        "gallery_steps",
    ):
        for value in of_rounds(config, name):
            if value < 0:
                raise ValueError(f"{name}={value}: expected 0 or more.")
    for name in ("guidance_scale", "eval_guidance_scale"):
        if not getattr(config, name) >= 1:
            raise ValueError(f"{name}={getattr(config, name)}: expected 1 (off) or more.")
    if config.text_weight == 0 and config.flow_weight == 0:
        raise ValueError("text_weight and flow_weight are both 0: nothing would be trained. Raise one of them.")
    if not config.thinking and config.text_weight > 0:
        raise ValueError(
            f"thinking=False with text_weight={config.text_weight}: there is no thinking to train. Set it to 0."
        )
    if config.image_objective != "flow_grpo" and config.flow_weight > 0:
        if config.flow_regularizer not in ("velocity_mse", "none"):
            raise ValueError(
                f"flow_regularizer={config.flow_regularizer!r} with image_objective={config.image_objective!r}: there "
                "are no noisy steps that could have a KL. Use 'velocity_mse' or 'none'."
            )
        if config.flow_old_source == "rollout":
            raise ValueError(
                f"flow_old_source='rollout' with image_objective={config.image_objective!r}: the sampler predicts "
                "no velocities on the lines. Use 'recompute'."
            )
    if config.text_weight == 0 and config.process_reward_weight > 0:
        raise ValueError(
            f"process_reward_weight={config.process_reward_weight} with text_weight=0: process rewards train the "
            "thinking alone, which is not trained. Raise text_weight, or leave them out."
        )


def check_window(config: Any) -> None:
    """Raise ValueError for a window of noisy steps that no image could have, in any round."""
    for name in PER_ROUND:
        given = len(of_rounds(config, name))
        if not given or given > config.num_rounds > 0:
            raise ValueError(
                f"{name}={getattr(config, name)} with num_rounds={config.num_rounds}: expected one value for all "
                f"rounds, or a list with one for each, at most {config.num_rounds}."
            )
    for number in range(rounds_that_differ(config)):
        _check_window(config, number)


def _check_window(config: Any, number: int) -> None:
    steps, size, window, noise_level = (of_round(config, name, number) for name in PER_ROUND)
    if len(window) != 2:
        raise ValueError(f"sde_window_range={window}: expected two step indices, low and high.")
    low, high = window
    if config.flow_weight == 0 or config.image_objective != "flow_grpo":
        return
    if not 0 <= low < high < steps:
        raise ValueError(
            f"sde_window_range={window} with num_inference_steps={steps}: expected 0 <= low < high <= {steps - 1}, as "
            "the last step can't be noisy: its noise would stay in the image."
        )
    if not 1 <= size <= high - low:
        raise ValueError(
            f"sde_window_size={size} does not fit into sde_window_range={window}: expected 1 to {high - low}. Shrink "
            "the window or widen the range."
        )
    if config.sde_type == "cps" and noise_level > 1:
        raise ValueError(f"noise_level={noise_level} with sde_type='cps': expected at most 1.")
    if noise_level == 0:
        raise ValueError("noise_level=0 leaves no stochastic step to train on. Use flow_weight=0 for text alone.")


def check_epochs(config: Any) -> None:
    """Raise ValueError where several passes over a generation would fall into one optimizer step."""
    repeats = config.steps_per_generation * config.num_iterations
    if config.num_iterations > 1 and config.gradient_accumulation_steps % repeats == 0:
        raise ValueError(
            f"num_iterations={config.num_iterations} does nothing here: with gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} and steps_per_generation={config.steps_per_generation}, all "
            "passes over a generation fall into one optimizer step. Leave steps_per_generation unset, or set "
            f"gradient_accumulation_steps={config.steps_per_generation}."
        )


def check_groups(config: Any, processes: int) -> None:
    """Raise ValueError where the generation batch of so many processes can't be cut, or is no number of groups."""
    group, batch = config.num_generations or 1, config.generation_batch_size
    once = config.per_device_train_batch_size * processes
    told = (
        f"per_device_train_batch_size={config.per_device_train_batch_size} on {processes} "
        f"process{'es' * (processes > 1)}"
    )
    if batch is not None and config.steps_per_generation is None and batch % math.lcm(once, group):
        raise ValueError(
            f"generation_batch_size={batch} with {told} and num_generations={group}: expected a multiple of "
            f"{math.lcm(once, group)}, so that each process has as much of it, and all of them whole groups. Or leave "
            "it unset."
        )
    name = "gradient_accumulation_steps" if config.steps_per_generation is None else "steps_per_generation"
    steps, least = getattr(config, name), math.lcm(once, group) // once
    if batch is None and steps % least:
        raise ValueError(
            f"{name}={steps} with {told} makes {steps * once} trajectories, no whole groups of "
            f"num_generations={group}: set {name} to a multiple of {least}, or another batch size."
        )
