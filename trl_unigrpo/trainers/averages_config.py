"""The options of averaged weights, and what is refused of them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class AveragesConfig:
    r"""
    Options of [`UniGRPOConfig`] for exponential moving averages of the weights that are trained, in [0, 1): 0 is the
    last weights alone, .99 about the mean of the last hundred. Each is one more copy of the weights, in float32.

    Parameters:
        > Parameters that control averaged weights

        image_old_policy_decay (`float`, *optional*):
            Decay of an average of the image expert's weights, which is the old policy of the objectives on lines: it
            paints the images and gives their old velocities. After the passes over each generation batch it moves
            towards the trained weights. None: the old policy is the trained one of a pass ago. DiffusionNFT: .5.
        image_old_policy_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps over which this decay rises from 0, linearly. DiffusionNFT: 500 for its .5.
        ema_decay (`float`, *optional*):
            Decay of an average of all trained weights, which is what is evaluated and saved, and what the model
            holds after the training. Moves after each optimizer step; in step t its decay is (1 + t) / (10 + t) at
            most, so that the start is forgotten early. DiffusionNFT: .9, AWM: .99.
    """

    image_old_policy_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay, in [0, 1), of an average of the image expert's weights that paints and is the old policy "
            "of 'fpo', 'awm' and 'nft'. None: off. DiffusionNFT: 0.5."
        },
    )
    image_old_policy_warmup_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps over which image_old_policy_decay rises from 0. DiffusionNFT: 500."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay, in [0, 1), of an average of all trained weights that is evaluated and saved. None: off. "
            "DiffusionNFT: 0.9, AWM: 0.99."
        },
    )


def check_averages(config: Any) -> None:
    """Raise ValueError for decays out of range, and for an old policy that the objective can't have."""
    for name in ("image_old_policy_decay", "ema_decay"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name}={value}: expected a number from 0 to below 1, such as 0.9, or None for none.")
    decay, warmup = config.image_old_policy_decay, config.image_old_policy_warmup_steps
    if warmup < 0 or (warmup and decay is None):
        raise ValueError(
            f"image_old_policy_warmup_steps={warmup} with image_old_policy_decay={decay}: expected 0 or more steps "
            "over which a decay rises. Set image_old_policy_decay, or leave both out."
        )
    if decay is None:
        return
    if config.flow_weight == 0:
        raise ValueError(
            f"image_old_policy_decay={decay} with flow_weight=0: no weights of the image expert are trained that "
            "could be averaged. Leave it out, or raise flow_weight."
        )
    if config.image_objective == "flow_grpo":
        raise ValueError(
            f"image_old_policy_decay={decay} with image_objective='flow_grpo': its ratio is that of noisy steps to "
            "the policy that sampled them, and an average lags behind by more than the ratio's clip range. Use "
            "'nft', 'awm' or 'fpo', or leave it out."
        )
