"""Which systems the page shows, in which order, and which runs the full grid has."""

from __future__ import annotations


GRID: dict[str, tuple[str, ...]] = {
    "table1": (
        "base",
        "sft",
        "sft_clean",
        "refl",
        "refl_thinking",
        "fpo",
        "fpo_thinking",
        "awm",
        "awm_thinking",
        "nft_thinking",
        "flow_grpo",
        "flow_grpo_thinking",
        "text_grpo",
        "two_stage",
        "unifpo",
        "unigrpo",
    ),
    "figure4": ("guidance_off", "guidance_on"),
    "figure5": ("no_regularizer", "latent_kl", "latent_kl_matched"),
    "ablations": (
        "no_ratio_norm",
        "cps",
        "window_1",
        "window_5",
        "context_full",
        "lambda_0.3",
        "lambda_3",
        "one_epoch",
    ),
    "hidden": ("two_stage_refl", "guided_base"),
}
"""Group -> systems. Those of "hidden", whatever group a run names, only are others' starts and stand in no table."""

WITHOUT_THINKING = ("refl", "fpo", "awm", "flow_grpo")
"""Trained and evaluated from the prompt alone. The base and the fine-tuned ones are evaluated both ways."""

SEEDS = (0, 1, 2, 3, 4)

ORDER = tuple(name for names in GRID.values() for name in names)


def full_grid() -> dict[str, tuple[int, ...]]:
    """System -> the seeds of the full grid. The base is not trained: one run of it stands for all seeds."""
    return {name: SEEDS[:1] if name == "base" else SEEDS for name in ORDER}


def position(system: str) -> tuple[int, str]:
    """A key that sorts systems as the page shows them; unknown ones last, by name."""
    return (ORDER.index(system) if system in ORDER else len(ORDER), system)


def main_mode(system: str) -> str:
    """The evaluation by which a system is judged: its own way to paint, thinkings sampled."""
    return "direct" if system in WITHOUT_THINKING else "sampled"
