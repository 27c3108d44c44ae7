"""The demo's second task: paint, look at the image, say what is wrong, and paint it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...shapeworld.dataset import shapeworld_dataset
from ...shapeworld.evaluate import EVALUATION_SEED, Evaluation, evaluate_model
from ...shapeworld.second_look import SecondLook, evaluate_second_look
from ...shapeworld.settings import refine_settings
from ...shapeworld.verifier import shapeworld_reward
from ...statistics import FloatArray
from .paint import first_of_each
from .rounds import Example, MeasuredRow, Painted, RoundsTask, write_rows


_SHOWN = 2
"""Of each category, on the page."""


@dataclass(frozen=True)
class Refined:
    """
    One model: its first images of N held-out prompts, what it made of them, and others in their place.

    Attributes:
        another: (N,) rewards of a second first image each, of other noise.
    """

    first: Evaluation
    look: SecondLook
    another: FloatArray


class RefineTask(RoundsTask[Refined]):
    """Paint, look, say what is wrong, and paint again or keep the image."""

    rollouts = 40
    num_rows = 1050
    reward = staticmethod(shapeworld_reward)
    panels: ClassVar = {
        "rounds/reward_1": "Reward of first images",
        "rounds/reward_2": "Reward of second images",
        "rounds/kept_2": "Images kept",
        "flow/velocity_mse": "Velocity MSE to the reference",
    }
    title = "UniGRPO in two rounds"
    lead = (
        "A tiny BAGEL thinks and paints, looks at its own image, says what is wrong in it, and paints it again or "
        "keeps it. All of it was trained from one reward on images."
    )
    shown = (
        "The first held-out prompts of each category whose first image had a fault before training; same noise on "
        "both sides."
    )
    main, what = "second", "the reward of the last image"
    led_by = "first", "second", "round_gain", "damage", "false_stop"

    def settings(self, rollouts: int) -> dict[str, Any]:
        return refine_settings(rollouts)

    def dataset(self, split: str, num_rows: int | None, seed: int) -> Dataset:
        return shapeworld_dataset(split, num_rows, seed)

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Refined:
        first = evaluate_model(model, tokenizer, num_rows)
        another = evaluate_model(model, tokenizer, num_rows, noise_seed=EVALUATION_SEED + 2)
        return Refined(first, evaluate_second_look(model, tokenizer, first), another.reward)

    def rows(self, measured: Refined) -> list[MeasuredRow]:
        look, best = measured.look, np.maximum(measured.look.first, measured.another)
        right = look.first_strict == 1
        return [
            MeasuredRow("first", "first image", look.first),
            MeasuredRow("second", "last image", look.reward),
            MeasuredRow("round_gain", "gain of the second round", look.reward - look.first),
            MeasuredRow("best_of_two", "the better of two first images, by the rule", best),
            MeasuredRow("above_best_of_two", "last image above that", look.reward - best),
            MeasuredRow("damage", "images that got worse", (look.reward < look.first).astype(float)),
            MeasuredRow("false_stop", "images with faults that were kept", np.where(right, np.nan, look.kept)),
            MeasuredRow("true_stop", "images without that were kept", np.where(right, look.kept, np.nan)),
            MeasuredRow("diagnosis", "diagnosis, F1", look.diagnosis),
            MeasuredRow("image_error", "image error of the first image", measured.first.error),
        ]

    def clusters(self, measured: Refined) -> list[str]:
        return measured.first.prompts

    def save(self, measured: Refined, file: Path) -> None:
        first, look = measured.first, measured.look
        columns: dict[str, Any] = {"prompt": first.prompts, "category": first.categories, "thinking": first.thinking}
        columns |= {"reward": look.first, "look": look.said, "kept": look.kept, "second_reward": look.reward}
        write_rows(columns, file)

    def examples(self, before: Refined, after: Refined) -> list[Example]:
        """Take the first prompts of each category whose first image, before training, has a fault."""

        def rounds(side: Refined, i: int) -> list[Painted]:
            first, look = side.first, side.look
            return [
                Painted(first.images[i], first.thinking[i], float(look.first[i])),
                Painted(look.images[i], look.said[i], float(look.reward[i]), kept=bool(look.kept[i])),
            ]

        faulty = [i for i, right in enumerate(before.look.first_strict) if not right]
        places = [faulty[i] for i in first_of_each([before.first.categories[i] for i in faulty], _SHOWN)]
        return [Example(before.first.prompts[i], [], rounds(before, i), rounds(after, i)) for i in places]
