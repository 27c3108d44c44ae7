"""The demo without a judge: the model's own reading of its images is the reward, and the rule only looks on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ...rewards import ReadBackReward
from ...sampling.self_reader import SelfReader
from ...shapeworld.agreement import rank_agreement
from ...shapeworld.settings import read_back_settings
from ...statistics import Interval
from .paint import Measured, Method, PaintTask


JUDGELESS = Method(
    "UniNFT",
    "the thinking by GRPO, the image by DiffusionNFT",
    read_back_settings,
    45,
    "they have fewer steps",
)


@dataclass(frozen=True)
class Read(Measured):
    """
    One model, and how its start reads its images.

    Attributes:
        agreement: rank correlation of read-back and rule among images of one prompt.
    """

    agreement: Interval


class ReadBackTask(PaintTask):
    """Paint what a prompt asks for, rewarded by how well the model reads the prompt back."""

    seeing = True
    title = "UniGRPO without a judge"
    lead = (
        "A tiny BAGEL thinks in words, paints coloured shapes, and reads its prompt back from the image. Its only "
        "reward is how likely the prompt is to the model that training starts from; the rule has no part in it."
    )
    verdict = "Trained without any judge, verified by the rule:"
    score = "score of the rule"
    panels: ClassVar = {
        "reward": "Log-likelihood of the prompts, per token",
        "completions/mean_length": "Thinking, tokens",
        "images/twins": "Images that repeat another of their prompt, share",
    }

    def __init__(self) -> None:
        super().__init__(JUDGELESS)
        self.reward = ReadBackReward()

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Read:
        measured, reader = super().measure(model, tokenizer, num_rows), ReadBackReward()
        reader.attach(SelfReader(model, tokenizer))
        return Read(**vars(measured), agreement=rank_agreement(model, tokenizer, reader))

    def summary(self, before: Measured, after: Measured) -> dict[str, Any]:
        sides = [("before", before), ("after", after)]
        read = {f"agreement_{when}": side.agreement._asdict() for when, side in sides if isinstance(side, Read)}
        return super().summary(before, after) | read
