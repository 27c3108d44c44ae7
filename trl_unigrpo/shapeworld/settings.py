"""The settings that ShapeWorld's tiny model is trained with."""

from typing import Any

from .evaluate import MAX_COMPLETION_LENGTH, NUM_INFERENCE_STEPS
from .reflection import MAX_REFLECTION_LENGTH, REFLECTION_TEMPLATE
from .render import IMAGE_SIZE


PROMPTS_PER_GENERATION = 12


def demo_settings(generations: int = 140) -> dict[str, Any]:
    """
    Give the demo's settings: the paper's, but for sizes and learning rates, which were chosen on validation prompts.

    Args:
        generations: rollouts of 12 prompts x 16 trajectories, each trained on twice.
    """
    return {
        "max_steps": 2 * generations,
        "num_generations": 16,
        "per_device_train_batch_size": 16 * PROMPTS_PER_GENERATION,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "image_size": IMAGE_SIZE,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "eval_num_inference_steps": NUM_INFERENCE_STEPS,
        "learning_rate": 4e-4,
        "image_learning_rate": 1.5e-4,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.99,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


FAST_ROLLOUTS = 50


def fast_settings(rollouts: int = FAST_ROLLOUTS) -> dict[str, Any]:
    """
    Give the settings that reach the demo's gain in the least time, chosen on validation prompts: DiffusionNFT for the
    images, at few steps, and half of the trajectories trained on.
    """
    return read_back_settings(rollouts) | {
        "num_generations": 8,
        "scout_generations": 16,
        "scout_num_inference_steps": 6,
        "per_device_train_batch_size": 8 * PROMPTS_PER_GENERATION,
    }


def refine_settings(rollouts: int = 40) -> dict[str, Any]:
    """
    Give the settings of `demo --task refine`: the demo's, with a second round.

    All trajectories of a prompt go on from one image. Where too many of these are perfect, or the second image is
    painted with much noise, which a kept one is spared, all images are kept after a few updates.
    """
    return demo_settings(rollouts) | {
        "system_prompt": "",
        "num_rounds": 2,
        "round_group": "tree",
        "round_select": "random",
        "keep_perfect": 0.2,
        "reflection_template": REFLECTION_TEMPLATE,
        "max_reflection_length": MAX_REFLECTION_LENGTH,
        "image_learning_rate": 5e-5,
        "noise_level": [0.7, 0.15],
    }


def read_back_settings(rollouts: int = 45) -> dict[str, Any]:
    """
    Give the settings of `demo --reward readback`: DiffusionNFT for the images, at few steps, which was the best and
    the quickest of three objectives on validation prompts.
    """
    return demo_settings(rollouts) | {
        "image_objective": "nft",
        "num_inference_steps": 6,
        "matching_samples": 3,
        "flow_regularizer": "none",
        "learning_rate": 6e-4,
        "image_learning_rate": 4e-4,
    }


def edit_settings(rollouts: int = 45) -> dict[str, Any]:
    """Give the settings of `demo --task edit`: the demo's, on rows with a source image."""
    return demo_settings(rollouts) | {
        "system_prompt": "",
        "max_completion_length": MAX_REFLECTION_LENGTH,
        "image_learning_rate": 5e-5,
    }
