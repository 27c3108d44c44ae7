"""Prompts that are painted as letters: a reader reads them back, and nothing of what they ask for is there."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from accelerate.utils import gather_object
from PIL import Image

from ..rewards.ocr import OCRReward, quoted_text, text_match
from .alarm import Alarm
from .best_read import best_read
from .events import Generation
from .memory import revive
from .shift import Shift


logger = logging.getLogger(__name__)

MOST_READ = 4
"""Images of a generation that are looked at: one of a group, the one that its prompt is read back from best."""
THREADS = 2
LEAST_SIDE = 64
"""Pixels of the shorter side, below which a prompt's letters can't be told from any other lines."""
RISEN, ERRORS = 0.2, 3.0
"""A fifth of a prompt, such as its nouns; and standard errors, fewer than elsewhere: an image shows all of its prompt
or nothing."""


@dataclass
class LettersWatch:
    """
    The memory between two generations; all of it can be written as JSON.

    Attributes:
        shift: means of [`painted_share`] at the start and now.
    """

    shift: Shift = field(default_factory=Shift)

    def __post_init__(self) -> None:
        self.shift = revive(Shift, self.shift)
        self._read: Callable[[Image.Image], str] | None = None
        self._said = False

    def shares(self, generation: Generation) -> dict[int, float]:
        """
        Find how much of its prompt each image of a few shows as letters: place -> share; nothing where the alarm is
        off. All processes must call it: each reads the images that it has.
        """
        chosen = best_read(generation, MOST_READ)
        if not chosen:
            return {}
        own = {place: text for place, text in chosen.items() if generation.holds(place)}
        found = [
            (place, share)
            for place, text in own.items()
            if (share := self._share(generation.images[place - generation.first], text)) is not None
        ]
        return dict(gather_object(found))

    def look(self, shares: Mapping[int, float]) -> list[Alarm]:
        """Look at a training generation."""
        if not shares:
            return []
        self.shift.add([*shares.values()])
        change = self.shift.change()
        if change is None or change.now - change.before < RISEN or change.errors < ERRORS:
            return []
        message = (
            f"OCR reads {change.now:.0%} of a prompt in its image, at the start {change.before:.0%}. Look at them: if "
            "prompts are painted as letters, go on from an earlier checkpoint with a higher flow_regularizer_weight, "
            "or add a reward that sees whether what they ask for is there."
        )
        values = {"before": change.before, "now": change.now, "standard_errors": change.errors}
        places = tuple(sorted(place for place, share in shares.items() if share > change.before))
        return [Alarm("read_back/letters", message, values, places)]

    def _share(self, image: Image.Image, prompt: str) -> float | None:
        if min(image.size) < LEAST_SIDE:
            self._say(f"off: images of {image.width} x {image.height} pixels are too small for letters")
            return None
        try:
            self._read = self._read or OCRReward(threads=THREADS).read
            return painted_share(self._read(image), prompt)
        except ImportError as error:
            self._say(f"off: {error}")
        except Exception as error:  # the libraries below share no class of errors, and none may end a run
            self._say(f"without an image that OCR fails on: {type(error).__name__}: {error}")
        return None

    def _say(self, what: str) -> None:
        if not self._said:
            logger.warning("The alarm read_back/letters, on prompts painted as letters, is %s.", what)
        self._said = True


def painted_share(recognized: str, prompt: str) -> float:
    """Say how much of a prompt was recognized, in [0, 1], beyond the text in quotation marks that it asks for."""
    asked = quoted_text(prompt)
    return max(0.0, text_match(recognized, prompt) - (0.0 if asked is None else text_match(asked, prompt)))
