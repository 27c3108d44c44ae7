"""The pre-trained base models inside the package."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..models.bagel import BagelForUnifiedGeneration


BASE = Path(__file__).parent / "weights"
SEEING_BASE = Path(__file__).parent / "weights_seeing"


def load_base(seeing: bool = False) -> tuple[BagelForUnifiedGeneration, PreTrainedTokenizerBase]:
    """
    Load a tiny BAGEL that `trl-unigrpo build-shapeworld` makes, and its tokenizer.

    Args:
        seeing: the one that also sees: for second looks, edits and stories.
    """
    source = SEEING_BASE if seeing else BASE
    return BagelForUnifiedGeneration.from_pretrained(source), AutoTokenizer.from_pretrained(source)
