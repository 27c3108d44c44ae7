"""Score a base model before any training by reward: the numbers that it is chosen and described by."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...shapeworld.evaluate import evaluate_model
from ...shapeworld.second_look import evaluate_edits, evaluate_second_look, reading_accuracy


def base_scores(
    model: Any, tokenizer: PreTrainedTokenizerBase, split: str = "validation", num_prompts: int = 1050
) -> dict[str, float]:
    """
    Score a base model on prompts and instructions of a split; what takes eyes is left out for a model without.

    Args:
        num_prompts: of the images; of edits there are half as many.
    """
    first = evaluate_model(model, tokenizer, num_prompts, split=split)
    scores = {
        "reward": first.reward,
        "all checks hold": first.strict,
        "reward of the plan, drawn perfectly": first.plan,
        "image error": first.error,
    }
    if model.vit_model is not None:
        look = evaluate_second_look(model, tokenizer, first)
        right = look.first_strict == 1
        edits = evaluate_edits(model, tokenizer, num_prompts // 2, split).scores
        scores |= {
            "gain of a second look": look.reward - look.first,
            "its gain, all checks": look.strict - look.first_strict,
            "diagnosis, F1": look.diagnosis,
            "keeps an image with faults": look.kept[~right],
            "keeps an image without": look.kept[right],
            "objects harmed by a repair": look.harmed,
            "images that got worse": (look.reward < look.first).astype(float),
            "edits, sqrt(done x kept)": edits.reward,
            "done": edits.done,
            "kept": edits.kept,
            "objects read right": np.array(reading_accuracy(model, tokenizer, num_prompts // 2)),
        }
    return {name: float(np.nanmean(values)) for name, values in scores.items()}
