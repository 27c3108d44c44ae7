"""The declared grid: every system that is trained, in what it differs from the others, and what is searched for it.

All are trained from one learned reward, start from the shipped base model unless `start` or `sees` says otherwise, and
see equally many images; the long runs three times as many. The learning rates of each method are chosen by the learned
reward on validation prompts, from equally many candidates (`chosen.py`), and so is the point at which a run stops
(`validation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .constants import matched_kl_weight, of_settings, times


Settings = Mapping[str, Any]

CHOSEN = Path(__file__).parent / "chosen.json"
"""The search's choice that is shipped, with which all reported runs were made."""

THINKING = ("sampled", "greedy")
DIRECT = ("direct",)
EVERY_MODE = ("sampled", "greedy", "direct")
GUIDED = ("guided", "sampled")

RATES = tuple({"learning_rate": rate} for rate in (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4))
IMAGE_RATES = tuple({"image_learning_rate": rate} for rate in (5e-5, 1e-4, 2e-4, 4e-4, 8e-4))
TEXT_RATES = tuple({"learning_rate": rate} for rate in (3.75e-5, 7.5e-5, 1.5e-4, 3e-4, 6e-4))
JOINT_RATES = tuple(
    {"learning_rate": text, "image_learning_rate": image}
    for text, image in ((1.5e-4, 5e-5), (3e-4, 1e-4), (3e-4, 2e-4), (6e-4, 2e-4), (6e-4, 4e-4))
)
SCALES = tuple({"guidance_scale": scale, "eval_guidance_scale": scale} for scale in (1.5, 2.0, 3.0, 4.0, 6.0))


@dataclass(frozen=True)
class Scale:
    """
    The amount that is trained and scored.

    Attributes:
        generations: rollouts of 192 trajectories; other methods than UniGRPO see as many images.
        num_prompts, split: the prompts that are scored.
    """

    generations: int
    num_prompts: int
    split: str = "test"


FULL, QUICK, SEARCH = Scale(70, 1050), Scale(28, 210), Scale(70, 700, "validation")
"""The search's runs are as long as the others: the rate that is best for a short run ruins a longer one."""
SEARCH_SEED = 100
"""Of every run of the search: no seed of a reported run."""


@dataclass(frozen=True)
class System:
    """
    One row of the grid.

    Attributes:
        title: its name in tables.
        group: the table or figure that it is for; one of `GROUPS`.
        method: "none" (not trained), "sft", "refl", or "unigrpo": `UniGRPOTrainer`, whatever its objective.
        settings: in what it differs from its method's own; a function stands for what it returns.
        modes: how it is scored: "sampled" or "greedy" thinking, "direct" (no thinking), "guided" (sampled, with
            classifier-free guidance of `eval_guidance_scale`), "rounds" (sampled, and its image looked at and painted
            again). The first is its own mode: search and early stopping go by it.
        candidates: settings among which the search chooses; empty for none.
        takes: other systems whose choice it takes over.
        start: the system whose model it goes on with, of the same seed; None for the base model.
        sees: it starts from the base that sees images.
        part: of the images that the others see: "whole", "first half", or "second half".
        length: how many times as long as the others' its runs are.
        early_stopping: its model is the one of the best point by the learned reward; without, the one of the end.
        reward: "learned", or "read_back": what the model itself reads in its images.
        hidden: it is only there to be another's start.
        against: the system that its row is compared with, in the mode that both have; None for the table's own.
    """

    name: str
    title: str
    group: str
    method: str
    settings: Mapping[str, Any | Callable[[], Any]] = field(default_factory=dict)
    modes: tuple[str, ...] = THINKING
    candidates: tuple[Settings, ...] = ()
    takes: tuple[str, ...] = ()
    start: str | None = None
    sees: bool = False
    part: str = "whole"
    length: int = 1
    early_stopping: bool = True
    reward: str = "learned"
    hidden: bool = False
    against: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Five for what a claim is about, three for the rest; one for what is not trained."""
        return tuple(range(1 if self.method == "none" else 3 if self.group in ("extras", "ablations") else 5))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The systems whose choices a run needs."""
        return (*self.takes, self.name) if self.candidates else self.takes


def long_run(name: str, title: str, settings: Mapping[str, Any] | None = None) -> System:
    """Declare UniGRPO with another regulariser, three times as long, whose end is scored: there hacking shows."""
    return System(
        f"long_{name}", title, "figure5", "unigrpo", settings or {}, takes=("unigrpo",), length=3, early_stopping=False
    )


NO_TEXT: Settings = {"text_weight": 0.0}
NO_THINKING: Settings = {"text_weight": 0.0, "thinking": False}
# Three points per image, as many trained states as the window of FlowGRPO has.
FPO, AWM, NFT = ({"image_objective": name, "matching_samples": 3} for name in ("fpo", "awm", "nft"))

ROUNDS = (
    *("system_prompt", "num_rounds", "round_group", "round_select", "keep_perfect"),
    *("reflection_template", "max_reflection_length", "noise_level"),
)
SCOUTS = (
    *("num_generations", "scout_generations", "scout_num_inference_steps", "num_inference_steps"),
    "per_device_train_batch_size",
)
"""The settings of two rounds, and of scouts, that `demo_settings` lack."""

# fmt: off
GRID = (
    System("base", "Base", "table1", "none", modes=EVERY_MODE),
    System("sft", "SFT", "table1", "sft", modes=EVERY_MODE, candidates=RATES),
    System("sft_clean", "SFT, corpus without errors", "table1", "sft", {"corpus_errors": False}, EVERY_MODE,
           takes=("sft",)),
    System("refl", "ReFL", "table1", "refl", {"thinking": False}, DIRECT, takes=("refl_thinking",)),
    System("refl_thinking", "ReFL (thinking)", "table1", "refl", candidates=RATES),
    System("fpo", "FPO", "table1", "unigrpo", {**NO_THINKING, **FPO}, DIRECT, takes=("fpo_thinking",)),
    System("fpo_thinking", "FPO (thinking)", "table1", "unigrpo", {**NO_TEXT, **FPO}, candidates=IMAGE_RATES),
    System("awm", "AWM", "table1", "unigrpo", {**NO_THINKING, **AWM}, DIRECT, takes=("awm_thinking",)),
    System("awm_thinking", "AWM (thinking)", "table1", "unigrpo", {**NO_TEXT, **AWM}, candidates=IMAGE_RATES),
    System("nft_thinking", "DiffusionNFT (thinking)", "table1", "unigrpo", {**NO_TEXT, **NFT}, candidates=IMAGE_RATES),
    System("flow_grpo", "FlowGRPO", "table1", "unigrpo", NO_THINKING, DIRECT,
           takes=("flow_grpo_thinking",)),
    System("flow_grpo_thinking", "FlowGRPO (thinking)", "table1", "unigrpo", NO_TEXT, candidates=IMAGE_RATES),
    System("text_grpo", "TextGRPO", "table1", "unigrpo", {"flow_weight": 0.0}, candidates=TEXT_RATES),
    System("two_stage_refl", "ReFL (thinking), half", "table1", "refl", modes=("sampled",), takes=("refl_thinking",),
           part="first half", hidden=True),
    System("two_stage", "ReFL (thinking), then TextGRPO", "table1", "unigrpo", {"flow_weight": 0.0},
           takes=("text_grpo",), start="two_stage_refl", part="second half"),
    System("unifpo", "UniFPO", "table1", "unigrpo", FPO, candidates=JOINT_RATES),
    System("uniawm", "UniAWM", "table1", "unigrpo", AWM, candidates=JOINT_RATES),
    System("uninft", "UniNFT", "table1", "unigrpo", NFT, candidates=JOINT_RATES),
    System("unigrpo", "UniGRPO", "table1", "unigrpo", candidates=JOINT_RATES),

    long_run("velocity_mse", "velocity MSE (UniGRPO)"),
    long_run("none", "no regulariser", {"flow_regularizer": "none"}),
    long_run("latent_kl", "latent KL, same weight", {"flow_regularizer": "latent_kl"}),
    long_run("latent_kl_matched", "latent KL, matched weight",
             {"flow_regularizer": "latent_kl", "flow_regularizer_weight": matched_kl_weight}),
    long_run("velocity_mse_10", "velocity MSE, weight x 10",
             {"flow_regularizer_weight": times(10, "flow_regularizer_weight")}),

    System("guided_base", "Base, for guidance", "figure4", "sft", {"context_dropout": 0.1}, GUIDED,
           SCALES, takes=("sft",), hidden=True),
    System("guidance_off", "trained without guidance", "figure4", "unigrpo", {"guidance_scale": 1.0}, GUIDED,
           takes=("unigrpo", "guided_base"), start="guided_base"),
    System("guidance_on", "trained with guidance", "figure4", "unigrpo", {}, GUIDED,
           takes=("unigrpo", "guided_base"), start="guided_base"),

    System("base_seeing", "Base that sees", "extras", "none", modes=("sampled", "rounds"), sees=True,
           against="base"),
    System("rounds", "UniGRPO in two rounds, from the base that sees", "extras", "unigrpo",
           of_settings("refine_settings", *ROUNDS), ("rounds", "sampled"), takes=("unigrpo",), sees=True,
           against="base_seeing"),
    System("read_back", "UniNFT rewarded by its own reading, from the base that sees", "extras", "unigrpo", NFT,
           takes=("uninft",), sees=True, reward="read_back", against="base_seeing"),
    System("scouts", "UniNFT with scouts", "extras", "unigrpo", {**NFT, **of_settings("fast_settings", *SCOUTS)},
           takes=("uninft",), against="uninft"),
    System("diversity", "UniGRPO, paid for different images", "extras", "unigrpo", {"diversity_weight": 1.0},
           takes=("unigrpo",)),
    System("text_kl", "UniGRPO, KL of the text", "extras", "unigrpo", {"beta": 0.04}, takes=("unigrpo",)),

    System("no_ratio_norm", "no RatioNorm", "ablations", "unigrpo", {"ratio_norm": False}, takes=("unigrpo",)),
    System("cps", "CPS for the SDE", "ablations", "unigrpo", {"sde_type": "cps"}, takes=("unigrpo",)),
    System("window_1", "window of 1 step", "ablations", "unigrpo", {"sde_window_size": 1}, takes=("unigrpo",)),
    System("window_5", "window of 5 steps", "ablations", "unigrpo", {"sde_window_size": 5}, takes=("unigrpo",)),
    System("context_full", "gradient through the context", "ablations", "unigrpo", {"flow_context_grad": "full"},
           takes=("unigrpo",)),
    System("lambda_0.3", "lambda 0.3", "ablations", "unigrpo", {"flow_weight": 0.3}, takes=("unigrpo",)),
    System("lambda_3", "lambda 3", "ablations", "unigrpo", {"flow_weight": 3.0}, takes=("unigrpo",)),
    # This shows if it is the clip range that holds UniGRPO back.
    System("clip_10", "clip range x 10", "ablations", "unigrpo", {"flow_epsilon": times(10, "flow_epsilon")},
           takes=("unigrpo",)),
    System("unifpo_8", "UniFPO, 8 points per image", "ablations", "unigrpo", {**FPO, "matching_samples": 8},
           takes=("unifpo",), against="unifpo"),
    System("one_epoch", "one pass over each rollout", "ablations", "unigrpo", {"num_iterations": 1},
           takes=("unigrpo",)),
)
# fmt: on
"""The systems in the order in which they are run: those that tell most come first."""
SYSTEMS = {system.name: system for system in GRID}

GROUPS = tuple(dict.fromkeys(system.group for system in GRID))
QUICK_SYSTEMS = ("base", "unigrpo", "flow_grpo_thinking", "text_grpo", "long_velocity_mse", "long_none")

TRACED = ("base", "unigrpo", "long_velocity_mse", "long_none")
"""The systems whose thinkings and images stand side by side on the page."""


def select(names: Sequence[str]) -> list[System]:
    """Select the systems of these names or groups; without names, all. Hidden ones are selected only by name."""
    unknown = [name for name in names if name not in SYSTEMS and name not in GROUPS]
    if unknown:
        raise ValueError(
            f"There is no system {', '.join(map(repr, unknown))}, expected some of {', '.join(SYSTEMS)}, or of the "
            f"groups {', '.join(GROUPS)}."
        )
    return [
        system
        for system in GRID
        if system.name in names or (not system.hidden and (not names or system.group in names))
    ]


def is_start(name: str) -> bool:
    """Say if another system goes on with its model."""
    return any(system.start == name for system in GRID)
