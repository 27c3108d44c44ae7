"""The settings of the ready-made configurations, by name."""

from typing import Any


SINGLE_GPU: dict[str, Any] = {
    "image_size": 512,
    "learning_rate": 1e-5,
    "image_learning_rate": 3e-4,
}
"""Settings of [`~trl_unigrpo.trainers.unigrpo_config.UniGRPOConfig.single_gpu`]."""

EDITING: dict[str, Any] = {**SINGLE_GPU, "num_generations": 12, "max_completion_length": 256}
"""Settings of [`~trl_unigrpo.trainers.unigrpo_config.UniGRPOConfig.editing`]."""

_TWO_ROUNDS = {**SINGLE_GPU, "num_rounds": 2, "round_group": "tree"}
_TWO_ROUNDS |= {"num_generations": 12, "per_device_train_batch_size": 2}

SELF_REFINEMENT: dict[str, Any] = {**_TWO_ROUNDS, "no_improve": "clamp", "allow_stop": False, "keep_perfect": 0.0}
"""Settings of [`~trl_unigrpo.trainers.unigrpo_config.UniGRPOConfig.self_refinement`]."""

REFLECT_UNTIL_GOOD: dict[str, Any] = {**_TWO_ROUNDS, "round_cost": 0.01, "eval_num_rounds": 4}
"""Settings of [`~trl_unigrpo.trainers.unigrpo_config.UniGRPOConfig.reflect_until_good`]."""

SELF_REWARDED: dict[str, Any] = {**SINGLE_GPU, "image_objective": "nft", "matching_samples": 3}
"""Settings of [`~trl_unigrpo.trainers.unigrpo_config.UniGRPOConfig.self_rewarded`]."""

FAST: dict[str, Any] = {
    **SELF_REWARDED,
    "flow_regularizer": "none",
    "num_inference_steps": 10,
    "num_generations": 8,
    "scout_generations": 16,
    "scout_num_inference_steps": 10,
}
"""Settings of [`~trl_unigrpo.trainers.unigrpo_config.UniGRPOConfig.fast`]."""

RECIPES: dict[str, dict[str, Any]] = {
    "single_gpu": SINGLE_GPU,
    "fast": FAST,
    "editing": EDITING,
    "self_refinement": SELF_REFINEMENT,
    "reflect_until_good": REFLECT_UNTIL_GOOD,
    "self_rewarded": SELF_REWARDED,
}
"""Settings by the name of what makes a [`UniGRPOConfig`] of them."""
