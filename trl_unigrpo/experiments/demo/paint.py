"""The demo's first task: think, and paint what a prompt asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from datasets import Dataset
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ...reporting.pages import png_uri
from ...shapeworld.dataset import shapeworld_dataset
from ...shapeworld.diversity import Diversity
from ...shapeworld.evaluate import Evaluation, evaluate_model, group_diversity
from ...shapeworld.grammar import CATEGORIES
from ...shapeworld.settings import FAST_ROLLOUTS, demo_settings, fast_settings
from ...shapeworld.verifier import shapeworld_reward
from ...statistics import Interval, mean_interval
from .task import Task


IMAGES_PER_CATEGORY = 2


class Method(NamedTuple):
    """A way to train: its name, how it works, its settings, rollouts, and what is special about their images."""

    name: str
    how: str
    settings: Callable[[int], dict[str, Any]]
    rollouts: int
    images: str


UNINFT = Method(
    "UniNFT",
    "the thinking by GRPO, the image by DiffusionNFT, on the best and the worst half of each prompt's images",
    fast_settings,
    FAST_ROLLOUTS,
    "they have fewer steps",
)
UNIGRPO = Method(
    "UniGRPO",
    "the thinking by GRPO, the image by FlowGRPO, as in the paper",
    demo_settings,
    140,
    "some of their steps are noisy",
)


@dataclass(frozen=True)
class Measured:
    """One model: its samples on the held-out prompts, and how much those of one prompt differ."""

    sampled: Evaluation
    greedy: Evaluation
    diversity: Diversity


@dataclass(frozen=True)
class Beside:
    """Another method on the same base: its name, its summary, and the model that it made."""

    name: str
    summary: dict[str, Any]
    measured: Measured


class PaintTask(Task[Measured]):
    """
    Paint what a prompt asks for, after a thinking.

    Attributes:
        beside: another method, which the page shows too.
        title, lead: of the page.
        verdict: what it says of a gain.
        score: what it calls the rule's numbers.
    """

    num_rows = 1050
    seeing = False
    reward: Callable[..., Any] = staticmethod(shapeworld_reward)
    template = "report.html.jinja"
    title: ClassVar[str] = "UniGRPO on ShapeWorld"
    lead: ClassVar[str] = (
        "A tiny BAGEL thinks in words, paints coloured shapes and is scored by a rule on the image alone. Both of its "
        "experts were trained from that one reward."
    )
    verdict: ClassVar[str] = "It works:"
    score: ClassVar[str] = "reward"
    panels: ClassVar = {
        "reward": "Reward of the rollouts",
        "flow/velocity_mse": "Velocity MSE to the reference",
        "completions/mean_length": "Thinking, tokens",
        "images/twins": "Images that repeat another of their prompt, share",
    }

    def __init__(self, method: Method = UNINFT):
        self.method, self.rollouts = method, method.rollouts
        self.beside: Beside | None = None

    def settings(self, rollouts: int) -> dict[str, Any]:
        return self.method.settings(rollouts)

    def dataset(self, split: str, num_rows: int | None, seed: int) -> Dataset:
        return shapeworld_dataset(split, num_rows, seed)

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Measured:
        return Measured(
            sampled=evaluate_model(model, tokenizer, num_rows),
            greedy=evaluate_model(model, tokenizer, num_rows, do_sample=False),
            diversity=group_diversity(model, tokenizer),
        )

    def save(self, measured: Measured, file: Path) -> None:
        measured.sampled.save(file)

    def summary(self, before: Measured, after: Measured) -> dict[str, Any]:
        old, new, prompts = before.sampled, after.sampled, before.sampled.prompts
        rewards = mean_interval(old.reward, prompts), mean_interval(new.reward, prompts)
        gain = mean_interval(new.reward - old.reward, prompts)
        greedy_gain = mean_interval(after.greedy.reward - before.greedy.reward, prompts)
        return {
            "reward_before": rewards[0].mean,
            "reward_after": rewards[1].mean,
            "ci95_before": [rewards[0].low, rewards[0].high],
            "ci95_after": [rewards[1].low, rewards[1].high],
            "gain": gain.mean,
            "ci95_gain": [gain.low, gain.high],
            "greedy_before": float(before.greedy.reward.mean()),
            "greedy_after": float(after.greedy.reward.mean()),
            "greedy_gain": greedy_gain.mean,
            "ci95_greedy_gain": [greedy_gain.low, greedy_gain.high],
            "strict_before": float(old.strict.mean()),
            "strict_after": float(new.strict.mean()),
            "n_eval": len(prompts),
            "image_error_before": float(old.error.mean()),
            "image_error_after": float(new.error.mean()),
            "latent_drift": latent_drift(old, new),
            "diversity_before": vars(before.diversity),
            "diversity_after": vars(after.diversity),
        }

    def table(self, before: Measured, after: Measured) -> Table:
        table = Table("category", "prompts", "before", "after", "gain (95 % interval)")
        for name, old, new, gain in category_rows(before.sampled, after.sampled):
            table.add_row(
                name, str(old.n), f"{old.mean:.3f}", f"{new.mean:.3f}", str(gain), end_section=name == CATEGORIES[-1]
            )
        return table

    def headline(self, summary: dict[str, Any]) -> str:
        names = {"reward_before": "before", "reward_after": "after", "gain": "gain"}
        old, new, gain = (
            "{:.3f} [{:.3f}, {:.3f}]".format(summary[name], *summary[f"ci95_{ends}"]) for name, ends in names.items()
        )
        return f"Held-out reward {old} -> {new}, gain {gain}"

    def page(self, before: Measured, after: Measured) -> dict[str, Any]:
        sides = before.sampled, after.sampled
        words: dict[str, Any] = {"title": self.title, "lead": self.lead, "verdict": self.verdict, "score": self.score}
        words |= {"method": self.method, "beside": self.beside}
        return {**words, "categories": category_rows(*sides), "examples": self._examples(*sides)}

    def _examples(self, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
        if self.beside is None:
            return examples({"before": before, "after": after})
        return examples({"before": before, self.beside.name: self.beside.measured.sampled, self.method.name: after})


def latent_drift(before: Evaluation, after: Evaluation) -> float:
    """Say how far the spread of the latents moved: |std after / std before - 1|."""
    return abs(float(after.latents.std() / before.latents.std()) - 1)


def category_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, Interval, Interval, Interval]]:
    """List category, reward before, after, and the paired gain; the last row is all of them."""
    categories, prompts = np.array(before.categories), np.array(before.prompts)
    rows = []
    for name in (*CATEGORIES, "all"):
        chosen = np.ones(len(categories), dtype=bool) if name == "all" else categories == name
        if chosen.any():
            old, new, of = before.reward[chosen], after.reward[chosen], prompts[chosen]
            rows.append((name, mean_interval(old, of), mean_interval(new, of), mean_interval(new - old, of)))
    return rows


def first_of_each(names: Sequence[str], number: int) -> list[int]:
    """Take the places of the first few of each name, in the order in which names come."""
    order = list(dict.fromkeys(names))
    return [place for name in order for place in [i for i, other in enumerate(names) if other == name][:number]]


def examples(sides: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """Take the first prompts of each category, with the thinkings and images of each model by its name."""
    rows, first = [], next(iter(sides.values()))
    for i in first_of_each(first.categories, IMAGES_PER_CATEGORY):
        shown = {
            name: {"thinking": e.thinking[i], "image": png_uri(e.images[i]), "reward": float(e.reward[i])}
            for name, e in sides.items()
        }
        rows.append({"prompt": first.prompts[i], "category": first.categories[i], "sides": shown})
    return rows
