"""Prompts as they were read back from the images of a run: their words, shaded, and the worst of them."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..rewards.readback.reading import Reading
from ..rewards.readback.words import Word, logged_reading, read_words, reading_columns
from .pages import readable
from .run_files import Run


MOST_SHOWN = 300
"""Words of a text that a page shows."""
DARKEST = 45
"""Percent of red behind a word that can't be read at all; at more, the word itself could not be read by people."""
WORST, LEAST_READ = 12, 3
"""Words in the table of the worst, and how often each was read at least."""


def readings(extra: Mapping[str, Any]) -> dict[str, Reading]:
    """Find what was read back of a sample, among what reward functions logged of it: column -> reading."""
    found = {name: logged_reading(extra[name]) for name in reading_columns(extra)}
    return {name: reading for name, reading in found.items() if reading is not None}


def shaded_words(reading: Reading) -> Markup:
    """Write a text as HTML in which each word is the redder the less likely it is, and says how likely on a hover."""
    words = read_words(reading)
    html = Markup("").join(map(_shaded, words[:MOST_SHOWN]))
    if (left_out := len(words) - MOST_SHOWN) > 0:
        html += Markup('<span class="soft"> … {:,} more words</span>').format(left_out)
    return Markup('<span class="text words" dir="auto">{}</span>').format(html)


def _shaded(word: Word) -> Markup:
    text = readable(word.text)
    if word.log_prob is None:
        return Markup("{}").format(text)
    shown = text.lstrip()
    # The cube root: prompts are written in words of some percent, which are neither sure nor impossible.
    shade = DARKEST * (1 - math.exp(word.log_prob / 3))
    return Markup('{}<span style="--shade:{:.0f}%" title="{}">{}</span>').format(
        text[: len(text) - len(shown)], shade, _percent(word.log_prob), shown
    )


def _percent(log_prob: float) -> str:
    return f"{100 * math.exp(log_prob):.3g} %"


@dataclass(frozen=True)
class ReadWord:
    """
    A word over a run.

    Attributes:
        word: in lower case.
        number: how often it was read.
        log_prob: its mean over all of these.
        first, last: means over the first and the last third of the run's steps; None where it was not read there.
    """

    word: str
    number: int
    log_prob: float
    first: float | None
    last: float | None

    @property
    def likelihood(self) -> str:
        """Its geometric mean, in percent."""
        return _percent(self.log_prob)


def worst_words(run: Run) -> dict[str, list[ReadWord]]:
    """Find the words of all shown images that were read back worst: column -> the least likely first."""
    seen: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for shown in run.shown:
        for sample in shown.samples:
            for column, reading in readings(sample.extra).items():
                for word in read_words(reading):
                    name = word.text.strip().strip("'’").casefold()
                    if word.log_prob is not None and any(map(str.isalnum, name)):
                        seen[column][name].append((shown.step, word.log_prob))
    end = max((shown.step for shown in run.shown), default=0)
    worst = {column: _worst(words, end) for column, words in seen.items()}
    return {column: words for column, words in worst.items() if words}


def _worst(words: Mapping[str, Sequence[tuple[int, float]]], end: int) -> list[ReadWord]:
    rows = [
        ReadWord(
            word,
            len(found),
            sum(log_prob for _, log_prob in found) / len(found),
            _mean([log_prob for step, log_prob in found if 3 * step < end]),
            _mean([log_prob for step, log_prob in found if 3 * step > 2 * end]),
        )
        for word, found in words.items()
        if len(found) >= LEAST_READ
    ]
    return sorted(rows, key=lambda row: (row.log_prob, row.word))[:WORST]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
