"""The demo's third task: change an image as an instruction says, and nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...shapeworld.dataset import shapeworld_edit_dataset
from ...shapeworld.edits import shapeworld_edit_reward
from ...shapeworld.second_look import Edited, evaluate_edits
from ...shapeworld.settings import edit_settings
from .paint import first_of_each
from .rounds import Example, MeasuredRow, Painted, RoundsTask, write_rows


_SHOWN = 3
"""Of each verb, on the page."""
TRAINED_ROWS = 4000


class EditTask(RoundsTask[Edited]):
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
    main, what = "reward", "the reward of an edit"
    led_by = "reward", "done", "kept"

    def settings(self, rollouts: int) -> dict[str, Any]:
        return edit_settings(rollouts)

    def dataset(self, split: str, num_rows: int | None, seed: int) -> Dataset:
        return shapeworld_edit_dataset(split, num_rows or TRAINED_ROWS, seed)

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Edited:
        return evaluate_edits(model, tokenizer, num_rows)

    def rows(self, measured: Edited) -> list[MeasuredRow]:
        scores = measured.scores
        return [
            MeasuredRow("reward", "sqrt(done x kept)", scores.reward),
            MeasuredRow("done", "done: cells that were to change, as asked", scores.done),
            MeasuredRow("kept", "kept: all others, as they were", scores.kept),
            MeasuredRow("picture_error", "image error", measured.error),
        ]

    def clusters(self, measured: Edited) -> list[str]:
        return measured.instructions

    def save(self, measured: Edited, file: Path) -> None:
        columns: dict[str, Any] = {"prompt": measured.instructions, "category": measured.categories}
        columns |= {"thinking": measured.said, "reward": measured.scores.reward}
        write_rows(columns, file)

    def examples(self, before: Edited, after: Edited) -> list[Example]:
        def steps(side: Edited, i: int) -> list[Painted]:
            return [
                Painted(side.sources[i], "", None),
                Painted(side.images[i], side.said[i], float(side.scores.reward[i])),
            ]

        places = first_of_each(before.categories, _SHOWN)
        return [Example(before.instructions[i], steps(before, i), steps(after, i)) for i in places]
