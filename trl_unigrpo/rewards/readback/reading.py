"""A text read back from an image, and the readers that can do it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from PIL import Image


READ_BACK = "read_back"
"""Column of the logged table: for each image the JSON of [token, log-prob] pairs, null where nothing was read."""


@dataclass(frozen=True)
class Reading:
    """
    A text as a model reads it back from an image.

    Attributes:
        tokens: T, as texts; joined, they are the text that was read.
        log_probs: T, log p of each token behind the image and the tokens before it, in (-inf, 0].
    """

    tokens: Sequence[str]
    log_probs: Sequence[float]

    @property
    def score(self) -> float:
        """
        The mean over all tokens but the first, which may hold a part of the template; of one token alone, its own.

        "Read It Back" (arXiv 2607.11886): R(x, y) = mean over t = 2..T of log p(x_t | x_<t, y).
        """
        counted = self.log_probs[1:] or self.log_probs
        return sum(counted) / len(counted)

    def to_json(self) -> str:
        """Give the pairs of token and log-prob, as the column [`READ_BACK`] holds them."""
        pairs = zip(self.tokens, self.log_probs, strict=True)
        return json.dumps([[token, round(log_prob, 4)] for token, log_prob in pairs], ensure_ascii=False)


def pieces(tokenizer: Any, text: str, ids: Sequence[int]) -> list[str]:
    """Cut a text into what each of its tokens stands for, white space before it included."""
    if not getattr(tokenizer, "is_fast", False):
        return cut(text, [tokenizer.decode([token]) for token in ids])
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = [0, *(end for _, end in offsets)]
    return [text[start:end] for start, end in pairwise(ends)]


PARTIAL = "\ufffd"
"""The sign as which a part of a character is decoded alone."""


def spelled(text: str, tokens: Sequence[str]) -> int | None:
    """
    Find the place of the first of those last tokens that spell a text, white space apart; None if they do not.

    The first one may hold letters of what stands before the text, which its tokenizer has merged with it.

    Args:
        tokens: each decoded alone: a part of a character is unreadable, or empty.
    """
    letters, place, first = "".join(text.split()), len(tokens), None
    left = {len(letters)}  # how many may be left to spell: a part of a character may be the last one, or not
    while left and place:
        place -= 1
        for sign in reversed("".join(tokens[place].split())):
            if sign == PARTIAL:
                left |= {at - 1 for at in left if not letters[at - 1].isascii()}
            else:
                left = {at - 1 for at in left if letters[at - 1] == sign}
            if 0 in left:
                first, left = place, left - {0}
    while first and (PARTIAL in tokens[first - 1] or not tokens[first - 1]):  # parts of the first character
        first -= 1
    return first


def cut(text: str, tokens: Sequence[str]) -> list[str]:
    """Cut a text into what each of its tokens stands for, as [`pieces`] does, by what each is decoded to alone."""
    ends = [0]
    for token in tokens:
        word = token.strip()
        while len(ends) == 1 and not text.startswith(word):  # the first one may be merged with what stands before
            word = word[1:]
        at = text.find(word, ends[-1]) if word and PARTIAL not in word else -1
        ends.append(ends[-1] if at < 0 else at + len(word))
    ends[-1] = len(text)
    return [text[start:end] for start, end in pairwise(ends)]


class Reader(Protocol):
    """
    A model that reads.

    Attributes:
        last_error: why a text could not be read, the last one of them.
    """

    last_error: str

    def read(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Reading | None]:
        """
        Read each text back from its image.

        Args:
            images: B, as they are painted.
            texts: B, none of them empty.

        Returns:
            B readings; None, with the reason in `last_error`, for a text that can't be read, such as one that is
            longer than the model's context.
        """
        ...
