"""The options of several rounds in one trajectory, and what is refused of them."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from ..sampling.reflection import TEMPLATE, check_template


@dataclass
class RoundsConfig:
    r"""
    Options of [`UniGRPOConfig`] for trajectories of several rounds: an image, a look at it, another image.

    Parameters:
        > Parameters that control several rounds

        num_rounds (`int`, *optional*, defaults to `1`):
            Images of a trajectory, at most; 1 is the paper's, and none of the others counts then.
        eval_num_rounds (`int`, *optional*):
            The same in evaluation; by default as in training.
        round_context (`str`, *optional*, defaults to `"markov"`):
            What a later round sees: the system message, the last image and its own words (`"markov"`), or all that
            came before (`"full"`).
        context_latents (`str`, *optional*, defaults to `"reencode"`):
            Latents of an image that is shown: of what the user sees, decoded and encoded (`"reencode"`), or those
            that were painted (`"direct"`). Either way they are made once, in the rollout.
        reflection_template (`str`, *optional*):
            What is said to the model's own image, with fields `{prompt}`, `{round}`, and `{or_stop}`, which offers
            `stop_text`.
        max_reflection_length (`int`, *optional*, defaults to `256`):
            Most tokens of the text of each later round.
        allow_stop (`bool`, *optional*, defaults to `True`):
            Whether a later round may keep the image: when all of the answer behind its thinking is `stop_text`.
        stop_text (`str`, *optional*, defaults to `"keep"`):
            That answer.
        stop_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the beginning in which training neither offers nor takes it, so that the model learns to
            mend before it learns to keep.
        train_rounds (`list[int]`, *optional*):
            Rounds that are trained, counted from 1; the images of others are painted by the ODE. By default all.

        > Parameters that control the credit of several rounds

        round_group (`str`, *optional*, defaults to `"independent"`):
            Whether each trajectory goes on from its own image, or all of a group from one of theirs (`"tree"`), where
            each round is paid its own image.
        round_select (`str`, *optional*, defaults to `"worst"`):
            Whose image a `"tree"` goes on from: `"worst"`, `"softmax"` (at random, bad ones rather), `"spread"` (the
            farthest from the group's mean) or `"random"`.
        keep_perfect (`float`, *optional*, defaults to `0.15`):
            Probability that it goes on from a perfect image, whose reward is all that `reward_weights` give, if there
            is one: so that keeping can be learnt.
        round_reward (`str`, *optional*, defaults to `"final"`):
            What a round is paid: the last image (`"final"`), its own (`"own"`), or all from its own on (`"sum"`, for
            stories).
        round_baseline (`float`, *optional*):
            How much of the reward of the image before is subtracted from a later round's; by default what leaves the
            least variance, a running mean of regressions.
        round_cost (`float`, *optional*, defaults to `0.0`):
            Taken from the reward for each image after the first.
        stop_bonus (`float`, *optional*, defaults to `0.0`):
            Added to what a round is paid that keeps a perfect image, one whose reward is all that `reward_weights`
            give. R3 has 1; without, keeping is paid as much as an image that is no better.
        no_improve (`str`, *optional*, defaults to `"none"`):
            What a later round that does not improve on the image before is paid instead of its gain: nothing
            (`"clamp"`, AlphaGRPO's code), or the least of its group (`"min"`, its paper).
    """

    num_rounds: int = field(default=1, metadata={"help": "Images of a trajectory, at most. Paper: 1."})
    eval_num_rounds: int | None = field(default=None, metadata={"help": "The same in evaluation. None: num_rounds."})
    round_context: str = field(
        default="markov", metadata={"help": "What a later round sees: 'markov' (the last image) or 'full'."}
    )
    context_latents: str = field(
        default="reencode", metadata={"help": "Latents of shown images: 'reencode' (of their pixels) or 'direct'."}
    )
    reflection_template: str = field(
        default=TEMPLATE,
        metadata={"help": "What is said to the model's own image; fields {prompt}, {round}, {or_stop}."},
    )
    max_reflection_length: int = field(default=256, metadata={"help": "Most tokens of a later round's text."})
    allow_stop: bool = field(default=True, metadata={"help": "Whether a later round may keep the image."})
    stop_text: str = field(default="keep", metadata={"help": "The answer that keeps it."})
    stop_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the beginning in which no round keeps the image."}
    )
    train_rounds: list[int] | None = field(
        default=None, metadata={"help": "Rounds that are trained, counted from 1. None: all."}
    )
    round_group: str = field(
        default="independent", metadata={"help": "'independent', or 'tree': a group goes on from one image."}
    )
    round_select: str = field(
        default="worst",
        metadata={"help": "Whose image a tree goes on from: 'worst', 'softmax', 'spread' or 'random'."},
    )
    keep_perfect: float = field(
        default=0.15, metadata={"help": "Probability that it goes on from a perfect image, if there is one."}
    )
    round_reward: str = field(
        default="final", metadata={"help": "What a round is paid: 'final', 'own' or 'sum' of the images."}
    )
    round_baseline: float | None = field(
        default=None,
        metadata={"help": "How much of the reward of the image before is subtracted. None: by regression."},
    )
    round_cost: float = field(default=0.0, metadata={"help": "Cost of each image after the first."})
    stop_bonus: float = field(default=0.0, metadata={"help": "Paid for keeping a perfect image. R3: 1."})
    no_improve: str = field(
        default="none", metadata={"help": "What no improvement is paid: 'none' (its gain), 'clamp' or 'min'."}
    )

    @property
    def most_rounds(self) -> int:
        """Rounds of a trajectory in training or evaluation, whichever has more."""
        return max(self.num_rounds, self.eval_num_rounds or 1)

    @property
    def scores_each_round(self) -> bool:
        """True where credit needs the reward of each image, not of the last alone."""
        final = self.round_reward == "final" and self.round_baseline == 0 and self.no_improve == "none"
        return not final or self.round_group == "tree" or self.stop_bonus > 0

    def trains_round(self, number: int) -> bool:
        """Say whether a round, counted from 0, is trained."""
        return self.train_rounds is None or number + 1 in self.train_rounds


_CHOICES = {
    "round_context": ("markov", "full"),
    "context_latents": ("reencode", "direct"),
    "round_group": ("independent", "tree"),
    "round_select": ("worst", "softmax", "spread", "random"),
    "round_reward": ("final", "own", "sum"),
    "no_improve": ("none", "clamp", "min"),
}


def check_rounds(config: Any) -> None:
    """Raise ValueError for options of several rounds that are out of range or contradict one another or TRL's."""
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r}: expected one of {', '.join(map(repr, choices))}.")
    for name in ("num_rounds", "eval_num_rounds", "max_reflection_length"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more.")
    endless = dict.fromkeys(("round_cost", "stop_bonus", "stop_warmup_steps"), float("inf"))
    for name, high in {"keep_perfect": 1.0, "round_baseline": 1.0, **endless}.items():
        if (value := getattr(config, name)) is not None and not 0 <= value <= high:
            raise ValueError(f"{name}={value}: expected a number from 0 to {high:g}.")
    trained = config.train_rounds
    if trained is not None and not (trained and all(1 <= number <= config.num_rounds for number in trained)):
        raise ValueError(
            f"train_rounds={trained} with num_rounds={config.num_rounds}: expected rounds from 1 to "
            f"{config.num_rounds}, at least one. Leave it out to train all."
        )
    check_template(config.reflection_template)
    if not config.stop_text.strip():
        raise ValueError(f"stop_text={config.stop_text!r}: expected a word. Set allow_stop=False for none.")
    for name in ("stop_warmup_steps", "stop_bonus"):
        if (value := getattr(config, name)) and not config.allow_stop:
            raise ValueError(f"{name}={value} with allow_stop=False: no round ever stops. Leave it at 0, or allow it.")
    if config.most_rounds > 1:
        _check_together(config)


def _check_together(config: Any) -> None:
    if not config.thinking:
        raise ValueError("thinking=False with several rounds: there is no text that could say what to mend. Think.")
    for name, allowed, reason in (
        ("importance_sampling_level", "token", "one ratio would mix the texts of all rounds"),
        ("multi_objective_aggregation", "sum_then_normalize", "rounds are paid one reward, the weighted sum"),
        ("mask_truncated_completions", False, "TRL looks at the last round's end alone, and masks all rounds by it"),
    ):
        if (value := getattr(config, name, allowed)) != allowed:
            raise ValueError(
                f"{name}={value!r} does not work with several rounds: {reason}. Leave it at {allowed!r}, or set "
                "num_rounds=1."
            )
    tree = config.round_group == "tree"
    if tree and config.round_context == "full":
        raise ValueError(
            "round_group='tree' with round_context='full': a trajectory would go on from another one's words. Use "
            "'markov'."
        )
    if tree and config.round_reward == "sum":
        raise ValueError(
            "round_reward='sum' with round_group='tree': what follows a round is another trajectory's. Use 'own'."
        )
    if config.no_improve == "clamp" and config.allow_stop:
        warnings.warn(
            "no_improve='clamp' with allow_stop=True: an image that got worse is paid as one that was kept, so that "
            "keeping can't be learnt. Set allow_stop=False, or no_improve='none'."
        )
