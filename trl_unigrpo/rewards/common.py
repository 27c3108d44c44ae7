"""The common parts of all rewards: the form of the call, names, and the way of failures.

A reward is a TRL reward function: it is called with `prompts`, `completions`, `images` (flat list of PIL images) and
the dataset's columns, and returns one number per image, or `None` where it has none. None needs the trainer.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from PIL import Image

from ..messages import user_text


logger = logging.getLogger(__name__)

Scores = list[float | None]

Seen = Image.Image | Sequence[Image.Image]
"""The subject of a question to a judge: an image, or several in the order in which it sees them."""


class DeadRewardError(RuntimeError):
    """A reward gave no score at all for several batches in a row."""


class Asker(Protocol):
    """A judge that answers yes-no questions about images: one behind an endpoint, or one in this process."""

    async def ask(self, pairs: Sequence[tuple[Seen, str]]) -> Scores:
        """Return P(yes) in [0, 1] for each (image or images, question), `None` where there was no answer."""
        ...


class Breaker:
    """
    A guard that stops a run whose reward is dead: GPU hours without a reward teach nothing.

    Args:
        name: of the reward.
        max_dead_batches: batches in a row without any score before [`DeadRewardError`] is raised.
    """

    def __init__(self, name: str, max_dead_batches: int = 3):
        if max_dead_batches < 1:
            raise ValueError(f"max_dead_batches={max_dead_batches}: expected at least 1.")
        self.name, self.max_dead_batches = name, max_dead_batches
        self._dead = 0

    def observe(
        self, scores: Scores, last_error: str = "", log_metric: Callable[[str, float], None] | None = None
    ) -> None:
        """Count the batch's failures, log their share as `<name>/failed`, and raise when too many were total."""
        failed = sum(score is None for score in scores)
        if log_metric is not None and scores:
            log_metric(f"{self.name}/failed", failed / len(scores))
        self._dead = self._dead + 1 if scores and failed == len(scores) else 0
        if self._dead >= self.max_dead_batches:
            raise DeadRewardError(
                f"{self.name} scored no image in {self._dead} batches in a row. Last error: "
                f"{last_error.rstrip('.') or 'unknown'}. Mend it and resume from the last checkpoint."
            )


class ImageReward(ABC):
    """
    Base of the rewards that score in this process. A subclass brings `score`.

    Args:
        name: of the reward, in TRL's metrics; its class's name by default.
        max_dead_batches: see [`Breaker`].
    """

    def __init__(self, name: str | None = None, max_dead_batches: int = 3):
        self.__name__ = name or type(self).__name__
        self.last_error = ""
        self._breaker = Breaker(self.__name__, max_dead_batches)

    @abstractmethod
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any]) -> Scores:
        """Return one score per image, `None` where there is none; `prompts` as plain texts."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        images: Sequence[Image.Image] = (),
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> Scores:
        """
        Score a batch as TRL asks for it.

        A RuntimeError of `score`, such as a device out of memory, makes a batch without scores; wrong use raises.

        Raises:
            TypeError, ValueError: if the images are not PIL images, one per prompt.
            DeadRewardError: after `max_dead_batches` batches without any score.
        """
        check_images(images, len(prompts))
        texts = list(map(user_text, prompts))
        try:
            scores = [finite(score) for score in self.score(images, texts, columns)]
        except RuntimeError as error:
            self.failed(error)
            scores = [None] * len(texts)
        self._breaker.observe(scores, self.last_error, log_metric)
        return scores

    def failed(self, error: Exception) -> None:
        """Keep and log an error that costs scores; the run goes on."""
        self.last_error = f"{type(error).__name__}: {error}"
        logger.warning("%s gives no score: %s", self.__name__, self.last_error)


class PerImage(ABC):
    """
    A reward that scores each image by itself, so that a trainer may ask about parts of a batch while it paints others.

    Asking is apart from scoring: all that concerns a whole batch, such as shares of failures, is done in `scores`.
    """

    @property
    @abstractmethod
    def per_image(self) -> bool:
        """True where parts may be asked about."""

    @abstractmethod
    async def answers(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        images: Sequence[Image.Image] = (),
        **columns: Any,
    ) -> list[Any]:
        """Ask about some images of a batch, in several calls at a time if need be; returns something for each."""

    @abstractmethod
    def scores(
        self,
        answers: list[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
    ) -> Scores:
        """Score a batch by all its answers."""


class AsyncReward(PerImage):
    """
    Base of the rewards that ask elsewhere. A subclass brings `answers` and `scores`.

    Args:
        name: of the reward, in TRL's metrics; its class's name by default.
        max_dead_batches: see [`Breaker`].
    """

    def __init__(self, name: str | None = None, max_dead_batches: int = 3):
        self.__name__ = name or type(self).__name__
        self._breaker = Breaker(self.__name__, max_dead_batches)

    @property
    def per_image(self) -> bool:
        """True unless a subclass makes something else of a whole batch."""
        return type(self).__call__ is AsyncReward.__call__

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        images: Sequence[Image.Image] = (),
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> Scores:
        """
        Score a batch as TRL asks for it; `None` where no answer came.

        Raises:
            TypeError, ValueError: if images or columns are missing or wrong.
            DeadRewardError: after `max_dead_batches` batches without any score.
        """
        return self.scores(await self.answers(prompts, completions, images, **columns), log_metric, log_extra)


def images_of(shown: Seen) -> list[Image.Image]:
    """List the images that a judge sees."""
    return [shown] if isinstance(shown, Image.Image) else list(shown)


def finite(score: Any) -> float | None:
    """Turn a score into a float; `None` for `None`, NaN and infinity."""
    return None if score is None or not math.isfinite(float(score)) else float(score)


def check_images(images: Sequence[Any], number: int) -> None:
    """Raise if these are not `number` PIL images."""
    if len(images) != number:
        raise ValueError(f"Got {len(images)} images for {number} prompts: pass `images`, one PIL image per prompt.")
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"Got an image of type {type(image).__name__}, expected a PIL image.")


def column(columns: dict[str, Any], name: str, reward: str) -> Sequence[Any]:
    """Return a column of the dataset; ValueError, with those that are there, if it is missing."""
    if name not in columns:
        known = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"{reward} reads the column {name!r}, which the dataset does not have (it has: {known}).")
    return columns[name]


def to_rgb(image: Image.Image, max_side: int | None = None) -> Image.Image:
    """Convert the image to RGB, transparent parts white, no side longer than `max_side` pixels."""
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    if max_side is not None and max(image.size) > max_side:
        scale = max_side / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image
