"""The declared grid: every system that is trained, in what it differs from the others, and what is searched for it.

All start from the shipped base model unless `start` says otherwise, and see equally many images. The learning rates
of each method are chosen on validation prompts from equally many candidates (`chosen.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


Settings = Mapping[str, Any]

CHOSEN = Path(__file__).parent / "chosen.json"
"""The search's choice that is shipped, with which all reported runs were made."""

THINKING = ("sampled", "greedy")
DIRECT = ("direct",)
EVERY_MODE = ("sampled", "greedy", "direct")
GUIDED = ("sampled", "guided")

RATES = tuple({"learning_rate": rate} for rate in (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4))
IMAGE_RATES = tuple({"image_learning_rate": rate} for rate in (5e-5, 1e-4, 2e-4, 4e-4, 8e-4))
TEXT_RATES = tuple({"learning_rate": rate} for rate in (3.75e-5, 7.5e-5, 1.5e-4, 3e-4, 6e-4))
JOINT_RATES = tuple(
    {"learning_rate": text, "image_learning_rate": image}
    for text, image in ((1.5e-4, 5e-5), (3e-4, 1e-4), (3e-4, 2e-4), (6e-4, 2e-4), (6e-4, 4e-4))
)
SCALES = tuple({"guidance_scale": scale, "eval_guidance_scale": scale} for scale in (1.25, 1.5, 2.0, 3.0, 4.0))


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


FULL, QUICK, SEARCH = Scale(70, 1050), Scale(35, 210), Scale(70, 700, "validation")
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
            classifier-free guidance of `eval_guidance_scale`). The first is its own mode: the search goes by it.
        candidates: settings among which the search chooses; empty for none.
        takes: other systems whose choice it takes over.
        start: the system whose model it goes on with, of the same seed; None for the base model.
        part: of the images that the others see: "whole", "first half", or "second half".
        hidden: it is only there to be another's start.
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
    part: str = "whole"
    hidden: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """Five for what the paper's first table compares, three for the rest; one for what is not trained."""
        return tuple(range(1 if self.method == "none" else 5 if self.group == "table1" else 3))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The systems whose choices a run needs."""
        return (*self.takes, self.name) if self.candidates else self.takes


def matched_kl_weight() -> float:
    """
    Find the weight at which the latent KL is as large as the velocity MSE for the same change of velocity.

    The KL of a step is w_t |v - v_ref|^2 with w_t of that step alone. The weight of the velocity MSE is divided by the
    mean of w_t over the steps of all windows that may be drawn.
    """
    import torch

    from ...flow import flow_timesteps, latent_kl, transition
    from ...flow.per_round import PER_ROUND, of_round
    from ...flow.schedule import window_steps
    from ...shapeworld.settings import demo_settings
    from ...trainers.unigrpo_config import UniGRPOConfig

    args = UniGRPOConfig(output_dir="", **demo_settings())
    number, size, window, noise_level = (of_round(args, name, 0) for name in PER_ROUND)
    steps = torch.tensor(window_steps(window, size, args.sde_window_mode))
    grid = flow_timesteps(number, args.timestep_shift)
    coefficients = transition(args.sde_type, grid[steps], grid[steps + 1], noise_level, grid[1])
    ones = torch.ones(len(steps), 1, dtype=torch.float64)
    return args.flow_regularizer_weight / latent_kl(ones, 0 * ones, coefficients, num_batch_dims=1).mean().item()


NO_TEXT: Settings = {"text_weight": 0.0}
NO_THINKING: Settings = {"text_weight": 0.0, "thinking": False}
# Three points per image, as many trained states as the window of FlowGRPO has.
FPO, AWM, NFT = ({"image_objective": name, "matching_samples": 3} for name in ("fpo", "awm", "nft"))

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
    System("unigrpo", "UniGRPO", "table1", "unigrpo", candidates=JOINT_RATES),

    System("no_regularizer", "no regulariser", "figure5", "unigrpo", {"flow_regularizer": "none"},
           takes=("unigrpo",)),
    System("latent_kl", "latent KL, same weight", "figure5", "unigrpo", {"flow_regularizer": "latent_kl"},
           takes=("unigrpo",)),
    System("latent_kl_matched", "latent KL, matched weight", "figure5", "unigrpo",
           {"flow_regularizer": "latent_kl", "flow_regularizer_weight": matched_kl_weight}, takes=("unigrpo",)),

    # These show if another weight than the paper's keeps images cleaner.
    System("velocity_mse_10", "velocity MSE, weight x 10", "figure5", "unigrpo", {"flow_regularizer_weight": 1.5e-4},
           takes=("unigrpo",)),
    System("velocity_mse_100", "velocity MSE, weight x 100", "figure5", "unigrpo", {"flow_regularizer_weight": 1.5e-3},
           takes=("unigrpo",)),

    System("guided_base", "Base, for guidance", "figure4", "sft", {"context_dropout": 0.1}, ("guided", "sampled"),
           SCALES, takes=("sft",), hidden=True),
    System("guidance_off", "trained without guidance", "figure4", "unigrpo", {"guidance_scale": 1.0}, GUIDED,
           takes=("unigrpo", "guided_base"), start="guided_base"),
    System("guidance_on", "trained with guidance", "figure4", "unigrpo", {}, GUIDED,
           takes=("unigrpo", "guided_base"), start="guided_base"),

    System("no_ratio_norm", "no RatioNorm", "ablations", "unigrpo", {"ratio_norm": False}, takes=("unigrpo",)),
    System("cps", "CPS for the SDE", "ablations", "unigrpo", {"sde_type": "cps"}, takes=("unigrpo",)),
    System("window_1", "window of 1 step", "ablations", "unigrpo", {"sde_window_size": 1}, takes=("unigrpo",)),
    System("window_5", "window of 5 steps", "ablations", "unigrpo", {"sde_window_size": 5}, takes=("unigrpo",)),
    System("context_full", "gradient through the context", "ablations", "unigrpo", {"flow_context_grad": "full"},
           takes=("unigrpo",)),
    System("lambda_0.3", "lambda 0.3", "ablations", "unigrpo", {"flow_weight": 0.3}, takes=("unigrpo",)),
    System("lambda_3", "lambda 3", "ablations", "unigrpo", {"flow_weight": 3.0}, takes=("unigrpo",)),
    # This shows if it is the clip range that holds UniGRPO back.
    System("clip_10", "clip range x 10", "ablations", "unigrpo", {"flow_epsilon": 1e-5}, takes=("unigrpo",)),
    System("unifpo_8", "UniFPO, 8 points per image", "ablations", "unigrpo", {**FPO, "matching_samples": 8},
           takes=("unifpo",)),
    System("one_epoch", "one pass over each rollout", "ablations", "unigrpo", {"num_iterations": 1},
           takes=("unigrpo",)),
)
# fmt: on
"""The systems in the order in which they are run: those that tell most come first."""
SYSTEMS = {system.name: system for system in GRID}

GROUPS = tuple(dict.fromkeys(system.group for system in GRID))
QUICK_SYSTEMS = ("base", "sft", "unigrpo", "flow_grpo_thinking", "text_grpo", "no_regularizer")


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
