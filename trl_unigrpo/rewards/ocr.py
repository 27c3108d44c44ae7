"""A reward for text that was asked for in the image, read by a real OCR model that runs on a CPU."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from .common import (
    ImageReward,
    Scores,
    column,
    to_rgb,
)


# From the left, double quotation marks of all scripts, each with those that close it, and then single ones. An
# apostrophe inside of a word is none.
_DOUBLE = re.compile(
    '"([^"]*)"|“([^“”]*)[“”]|„([^“”"]*)[“”"]|”([^”]*)”|«([^»]*)»|»([^«»]*)[«»]|「([^」]*)」|『([^』]*)』'
    "|﹁([^﹂]*)﹂|﹃([^﹄]*)﹄|＂([^＂]*)＂|〝([^〞〟]*)[〞〟]|❝([^❞]*)❞"
)
_SINGLE = re.compile(
    r"(?<!\w)'(.+?)'(?!\w)|‘(.+?)’(?!\w)|(?<!\w)‚(.+?)[‘’](?!\w)|‹([^›]+)›|›([^‹›]+)[‹›]|＇([^＇]+)＇"
)

# What Unicode's compatible forms leave apart and a reader does not: quotation marks, dashes, dots.
_ALIKE = str.maketrans(
    dict.fromkeys("“”„‟«»「」『』﹁﹂﹃﹄〝〞〟❝❞″", '"')
    | dict.fromkeys("‘’‚‛‹›′`´❛❜", "'")
    | dict.fromkeys("‐‑‒–—―−⸺⸻", "-")
    | {"⋯": "..."}
)
_UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Categories of white space, line ends, and characters that show nothing, such as the soft hyphen."""


def quoted_text(prompt: str) -> str | None:
    """
    Find the first quoted text of a prompt, in the quotation marks of any script, double ones before single ones;
    `None` if nothing is quoted.
    """
    for pattern in (_DOUBLE, _SINGLE):
        for match in pattern.finditer(prompt):
            if text := match[match.lastindex or 0].strip():
                return text
    return None


def normalized(text: str) -> str:
    """
    Write a text as texts are compared: Unicode's compatible forms (NFKC: full-width letters, ligatures, the ellipsis),
    one form of each quotation mark and dash, no case, no white space and nothing else that can't be seen.
    """
    # Before it as well: NFKC makes a space with an accent of "´".
    text = unicodedata.normalize("NFKC", text.translate(_ALIKE)).translate(_ALIKE).casefold()
    return "".join(character for character in text if unicodedata.category(character) not in _UNSEEN)


def text_match(recognized: str, target: str) -> float:
    """
    Say how much of a text was recognized, in [0, 1], by Flow-GRPO's definition (arXiv 2505.05470).

    `1 - min(Lev(recognized, target), len(target)) / len(target)`, Lev the edit distance, both texts [`normalized`]; 1
    where the target is a part of what was recognized.

    Raises:
        ValueError: if the target has no character that can be seen.
    """
    from rapidfuzz.distance import Levenshtein

    recognized, target = normalized(recognized), normalized(target)
    if not target:
        raise ValueError("The target text is empty: expected at least one character that can be seen.")
    if target in recognized:
        return 1.0
    return 1 - min(Levenshtein.distance(recognized, target), len(target)) / len(target)


class OCRReward(ImageReward):
    """
    A reward by [`text_match`] of the text that an OCR model reads in each image. Needs `pip install trl-unigrpo[ocr]`,
    whose wheel brings the model.

    Args:
        target_column: column with the texts. By default `target` if the dataset has it, or else the text that each
            prompt has in quotation marks.
        missing: of a row without a text: "error" raises ValueError, "none" gives it no score.
        min_confidence: recognized lines below it do not count, in [0, 1].
        threads: CPU threads of the OCR model; all cores by default.
        name, max_dead_batches: see [`ImageReward`].

    An image on which the model fails gets `None`. One without text gets 0.
    """

    def __init__(
        self,
        target_column: str | None = None,
        missing: Literal["error", "none"] = "error",
        min_confidence: float = 0.5,
        threads: int | None = None,
        name: str | None = None,
        max_dead_batches: int = 3,
    ):
        super().__init__(name, max_dead_batches)
        if missing not in ("error", "none"):
            raise ValueError(f"missing={missing!r}: expected 'error' or 'none'.")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence={min_confidence}: expected a number in [0, 1].")
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: expected at least 1, or None for all cores.")
        try:
            import rapidfuzz  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError("OCRReward reads with rapidocr: pip install 'trl-unigrpo[ocr]'.") from error
        self.target_column, self.missing = target_column, missing
        params = {
            "Global.log_level": "error",
            "Global.text_score": min_confidence,
            "Global.use_cls": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads or -1,
        }
        self._engine = RapidOCR(params=params)

    def read(self, image: Image.Image) -> str:
        """Read the text in an image: its lines from top to bottom, one after the other."""
        blue_green_red = np.ascontiguousarray(np.asarray(to_rgb(image))[:, :, ::-1])
        return "".join(getattr(self._engine(blue_green_red), "txts", None) or ())

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any]) -> Scores:
        targets = self.targets(prompts, columns)
        return [
            None if text is None else self._match(image, text) for image, text in zip(images, targets, strict=True)
        ]

    def targets(self, prompts: Sequence[str], columns: dict[str, Any]) -> list[str | None]:
        """
        Return the text that each image should show, `None` where there is none.

        Raises:
            ValueError: if a row has none and `missing="error"`, or the dataset lacks the column that was named.
        """
        name = self.target_column or "target"
        if self.target_column is not None or name in columns:
            given = [str(text) if text is not None else "" for text in column(columns, name, self.__name__)]
            where = f"its column {name!r} is empty"
        else:
            given = [quoted_text(prompt) or "" for prompt in prompts]
            where = "the dataset has no column 'target', and its prompt has nothing in quotation marks"
        found = [text if normalized(text) else None for text in given]
        for row, (text, prompt) in enumerate(zip(found, prompts, strict=True)):
            if text is None and self.missing == "error":
                raise ValueError(
                    f"{self.__name__}: row {row} of the batch, {prompt!r}, has no text to look for: {where}. "
                    "Give it one, or pass missing='none' to leave such rows without a score."
                )
        return found

    def _match(self, image: Image.Image, target: str) -> float | None:
        try:
            return text_match(self.read(image), target)
        except Exception as error:  # the libraries below share no class of errors
            self.failed(error)
            return None
