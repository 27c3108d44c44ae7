"""The demo's third task: change an image as an instruction says, and nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...shapeworld.dataset import shapeworld_edit_dataset
from ...shapeworld.edits import shapeworld_edit_reward
from ...shapeworld.second_look import Edited, StoryScores, evaluate_edits, evaluate_stories
from ...shapeworld.settings import edit_settings
from .paint import first_of_each
from .rounds import Example, MeasuredRow, Painted, RoundsTask, write_rows


_SHOWN = 3
"""Of each verb, on the page."""
TRAINED_ROWS = 4000


class Editing(NamedTuple):
    """One model: single edits of N held-out rows, and stories of three edits."""

    edits: Edited
    stories: StoryScores


class EditTask(RoundsTask[Editing]):
    """Change an image as an instruction says."""

    rollouts = 45
    num_rows = 1050
    reward = staticmethod(shapeworld_edit_reward)
    panels: ClassVar = {
        "reward": "Reward of the rollouts",
        "flow/velocity_mse": "Velocity MSE to the reference",
        "completions/mean_length": "Thinking, tokens",
    }
    title = "UniGRPO edits images"
    lead = (
        "A tiny BAGEL sees an image and an instruction, says what it will change, and paints the image anew. Both of "
        "its experts were trained from one reward: sqrt(done x kept), of the cells that were to change and of all "
        "others."
    )
    shown = (
        "The first held-out instructions of each verb, not chosen for what became of them; same noise on both sides."
    )
    main, what = "reward", "the reward of an edit"
    led_by = "reward", "done", "kept"

    def settings(self, rollouts: int) -> dict[str, Any]:
        return edit_settings(rollouts)

    def dataset(self, split: str, num_rows: int | None, seed: int) -> Dataset:
        return shapeworld_edit_dataset(split, num_rows or TRAINED_ROWS, seed)

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Editing:
        stories = evaluate_stories(model, tokenizer, max(2, num_rows // 5))
        return Editing(evaluate_edits(model, tokenizer, num_rows), stories)

    def rows(self, measured: Editing) -> list[MeasuredRow]:
        scores, stories = measured.edits.scores, measured.stories
        told = [turns[0] for turns in stories.turns]
        return [
            MeasuredRow("reward", "sqrt(done x kept)", scores.reward),
            MeasuredRow("done", "done: cells that were to change, as asked", scores.done),
            MeasuredRow("kept", "kept: all others, as they were", scores.kept),
            MeasuredRow("image_error", "image error", measured.edits.error),
            MeasuredRow("story", "sqrt(done x kept) after three edits in a row", stories.scores.reward, told),
            MeasuredRow("untouched", "cells that none of the three was to change", stories.untouched, told),
        ]

    def clusters(self, measured: Editing) -> list[str]:
        return measured.edits.instructions

    def save(self, measured: Editing, file: Path) -> None:
        edits = measured.edits
        columns: dict[str, Any] = {"prompt": edits.instructions, "category": edits.categories}
        write_rows(columns | {"thinking": edits.said, "reward": edits.scores.reward}, file)

    def examples(self, before: Editing, after: Editing) -> list[Example]:
        def rounds(measured: Editing, i: int) -> list[Painted]:
            edits = measured.edits
            return [Painted(edits.images[i], edits.said[i], float(edits.scores.reward[i]))]

        first = before.edits
        return [
            Example(first.instructions[i], [first.sources[i]], rounds(before, i), rounds(after, i))
            for i in first_of_each(first.categories, _SHOWN)
        ]
