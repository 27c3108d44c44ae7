"""The words of a text that was read back, each with its likelihood, out of what rewards log."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .reading import READ_BACK, Reading


# Within a word stand letters, digits and apostrophes; a character of Chinese, Japanese or Korean is a word of its own.
_WITHIN = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|['’]")


@dataclass(frozen=True)
class Word:
    """
    A word, or a sign between words, of a text that was read back.

    Attributes:
        text: as it stands there, white space before it included.
        log_prob: log p of it behind the image and all before it; None where only the text's first token is in it,
            which the score leaves out.
    """

    text: str
    log_prob: float | None


def reading_columns(names: Iterable[str]) -> list[str]:
    """Find the columns that hold readings, one for each reward that reads back."""
    return [name for name in names if name == READ_BACK or name.startswith((f"{READ_BACK}_", f"{READ_BACK} "))]


def logged_reading(value: Any) -> Reading | None:
    """Read a value of such a column; None where nothing was read, or where the value is something else."""
    try:
        pairs = [(str(token), float(log_prob)) for token, log_prob in json.loads(value)]
    except (TypeError, ValueError):
        return None
    if not pairs or not all(math.isfinite(log_prob) for _, log_prob in pairs):
        return None
    return Reading(*zip(*pairs, strict=True))


def read_words(reading: Reading) -> list[Word]:
    """Join the tokens of each word: its log-prob is the sum of theirs."""
    log_probs = [None if place == 0 else log_prob for place, log_prob in enumerate(reading.log_probs)]
    if len(log_probs) == 1:
        log_probs = [*reading.log_probs]
    words: list[Word] = []
    for token, log_prob in zip(reading.tokens, log_probs, strict=True):
        word = Word(token, log_prob)
        if words and _goes_on(words[-1].text, token):
            before = words.pop()
            known = [x for x in (before.log_prob, log_prob) if x is not None]
            word = Word(before.text + token, sum(known) if known else None)
        words.append(word)
    return words


def _goes_on(before: str, token: str) -> bool:
    """Say whether a token belongs to the word before it, of which nothing but white space may be there yet."""
    if not token or not before.strip():
        return True
    return bool(_WITHIN.match(before[-1]) and _WITHIN.match(token))
