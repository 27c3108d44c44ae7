"""Thinkings that shrink to nothing, run into their limit, or repeat themselves."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .alarm import MOST_INDICES, Alarm
from .image_statistics import FloatArray
from .memory import revive
from .shift import BEYOND_CHANCE, Shift


NGRAM = 4
REPEATED = 0.2
"""Rise of the share of repeated four-word phrases that counts."""
SHRUNK = 0.5
"""Share of its length at the start below which a thinking has shrunk."""
CLIPPED, CLIPPED_RISE, CLIPPED_GENERATIONS = 0.5, 0.25, 3
"""Half of the thinkings cut off, a quarter more than at the start, in three generations in a row."""

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def repetition(text: str) -> float:
    """
    Return the share, in [0, 1), of a text's four-word phrases that stood in it before; 0 for fewer than four words.

    A character of Chinese, Japanese or Korean counts as a word.
    """
    words = _WORDS.findall(text.lower())
    phrases = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0


def plain_text(thinking: Any) -> str:
    """
    Return the text of a completion: a string, or a conversation of which only the model's own messages are there.
    """
    if isinstance(thinking, str):
        return thinking
    contents = [message.get("content") or "" for message in thinking]
    return " ".join(content if isinstance(content, str) else str(content) for content in contents)


@dataclass
class ThinkingWatch:
    """
    The memory between two generations; all of it can be written as JSON.

    Attributes:
        length, repeated: characters and repetition of a thinking, at the start and now.
        clipped: share of thinkings that were cut off, first in the first generation, then in the last ones.
    """

    length: Shift = field(default_factory=Shift)
    repeated: Shift = field(default_factory=Shift)
    clipped: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.length, self.repeated = revive(Shift, self.length), revive(Shift, self.repeated)

    def look(self, texts: Sequence[str], found: FloatArray, group_size: int, clipped: float | None) -> list[Alarm]:
        """
        Look at a training generation.

        Args:
            texts: N thinkings, groups side by side.
            found: (N,) their repetition.
            clipped: share of them that reached `max_completion_length`, where it is known.
        """
        lengths = np.array([len(text) for text in texts], dtype=float)
        self.length.add(lengths.reshape(-1, group_size).mean(1).tolist())
        self.repeated.add(found.reshape(-1, group_size).mean(1).tolist())
        return [*self._short(lengths), *self._repeating(found), *self._cut_off(clipped, lengths)]

    def _short(self, lengths: FloatArray) -> list[Alarm]:
        change = self.length.change()
        if change is None or change.now > SHRUNK * change.before or change.errors > -BEYOND_CHANCE:
            return []
        message = (
            f"thinkings have shrunk to {change.now:.3g} characters from {change.before:.3g} at the start. If images "
            "need them, reward their length or format, raise beta, or lower learning_rate."
        )
        values = {"before": change.before, "now": change.now}
        return [Alarm("thinking/length", message, values, _first(lengths))]

    def _repeating(self, found: FloatArray) -> list[Alarm]:
        change = self.repeated.change()
        if change is None or change.now - change.before < REPEATED or change.errors < BEYOND_CHANCE:
            return []
        message = (
            f"{change.now:.0%} of a thinking's phrases stood in it before, {change.before:.0%} at the start. Raise "
            "beta, lower learning_rate or the temperature, or give repetition a negative reward."
        )
        values = {"before": change.before, "now": change.now}
        return [Alarm("thinking/repetition", message, values, _first(-found))]

    def _cut_off(self, clipped: float | None, lengths: FloatArray) -> list[Alarm]:
        if clipped is None:
            return []
        self.clipped = [*self.clipped[:1], *self.clipped[1:][1 - CLIPPED_GENERATIONS :], clipped]
        least = max(CLIPPED, self.clipped[0] + CLIPPED_RISE)
        if len(self.clipped) <= CLIPPED_GENERATIONS or min(self.clipped[1:]) < least:
            return []
        message = (
            f"{clipped:.0%} of the thinkings are cut off at max_completion_length, {self.clipped[0]:.0%} at first. "
            "The image follows from half a thought. Raise the limit, reward shorter thinkings, or lower learning_rate."
        )
        return [Alarm("thinking/limit", message, {"before": self.clipped[0], "now": clipped}, _first(-lengths))]


def _first(values: FloatArray) -> tuple[int, ...]:
    """Find the places of the smallest values."""
    return tuple(sorted(int(i) for i in np.argsort(values, kind="stable")[:MOST_INDICES]))
