"""The pre-trained base model inside the package."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..models.bagel import BagelForUnifiedGeneration


BASE = Path(__file__).parent / "weights"


def load_base() -> tuple[BagelForUnifiedGeneration, PreTrainedTokenizerBase]:
    """Load the tiny BAGEL that `trl-unigrpo build-shapeworld` makes, and its tokenizer."""
    return BagelForUnifiedGeneration.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
