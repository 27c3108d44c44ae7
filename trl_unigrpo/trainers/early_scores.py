"""Scores that are asked for while the rest of a batch is painted."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..rewards.common import PerImage
from .failed_images import without_failed
from .trl_bridge import is_async_callable


@dataclass
class AskedPart:
    """
    Some images of a batch that a reward function is asked about.

    Attributes:
        places: of the images in the batch.
        answers: one for each image, as soon as they are there.
        columns, metrics: that the function logs.
        began, ended: on the clock of `time.perf_counter`.
    """

    places: Sequence[int]
    answers: Future[list[Any]] = field(default_factory=Future)
    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    metrics: list[tuple[str, float]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    ended: float = float("inf")

    def end(self, _: Any) -> None:
        """Note when the answers came."""
        self.ended = time.perf_counter()

    def log_metric(self, name: str, value: float) -> None:
        """Keep a metric until the batch is complete."""
        self.metrics.append((name, value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep rows of a column until the batch is complete."""
        self.columns[column].extend(values)


class EarlyScores:
    """
    The scores of a reward function that may be asked about parts of a batch before all of it is painted.

    Args:
        reward_func: a function that [`scores_early`].
        check: makes a list of what such a function returned.
    """

    def __init__(self, reward_func: Any, check: Callable[[Any], list[Any]]):
        self.reward_func, self.check = _unwrapped(reward_func), check
        self.parts: list[AskedPart] = []

    def begin(self, loop: asyncio.AbstractEventLoop, places: Sequence[int], arguments: Mapping[str, Any]) -> None:
        """
        Ask about some images, in an event loop that runs in another thread. The failed ones are left out.

        Args:
            places: of the images in the batch.
            arguments: of the reward function, for these images.
        """
        given, sound = without_failed(arguments)
        part = AskedPart(places if sound is None else [places[i] for i in sound])
        if part.places:
            part.answers = asyncio.run_coroutine_threadsafe(self._answers(part, given), loop)
            part.answers.add_done_callback(part.end)
            self.parts.append(part)

    async def collect(self, **given: Any) -> list[Any]:
        """
        Score a batch: by the answers to its parts, or, where there are none, by asking now.

        Args:
            given: arguments of the reward function for the whole batch, the failed images left out.
        """
        parts = self.parts
        try:
            if parts:
                found = [await asyncio.wrap_future(part.answers) for part in parts]
            else:
                parts = [AskedPart(range(len(given["prompts"])))]
                found = [await self._answers(parts[0], given)]
        finally:  # after an error nobody waits for the others
            self.cancel()
        answers = _by_place(parts, found)
        log_metric, log_extra = given["log_metric"], given["log_extra"]
        if isinstance(self.reward_func, PerImage):
            return list(self.reward_func.scores(list(answers.values()), log_metric, log_extra))
        for part in parts:
            for metric in part.metrics:
                log_metric(*metric)
        for name in dict.fromkeys(name for part in parts for name in part.columns):
            column = _by_place(parts, [part.columns.get(name) or [None] * len(part.places) for part in parts])
            log_extra(name, list(column.values()))
        return list(answers.values())

    def cancel(self) -> None:
        """Stop asking."""
        parts, self.parts = self.parts, []
        for part in parts:
            part.answers.cancel()

    async def _answers(self, part: AskedPart, given: Mapping[str, Any]) -> list[Any]:
        """Ask about a part, whose answers wait for the others, and so do its logs."""
        given = {name: value for name, value in given.items() if name not in ("log_metric", "log_extra")}
        if isinstance(self.reward_func, PerImage):
            return await self.reward_func.answers(**given)
        return self.check(await self.reward_func(**given, log_metric=part.log_metric, log_extra=part.log_extra))


def scores_early(function: Any) -> bool:
    """Say whether a reward function may be asked about parts of a batch: asynchronous, and its `per_image` is True."""
    function = _unwrapped(function)
    asynchronous = isinstance(function, PerImage) or is_async_callable(function)
    return asynchronous and bool(getattr(function, "per_image", False))


def _unwrapped(function: Any) -> Any:
    """Find the function that was marked by a [`thinking_reward`]."""
    while isinstance(function, partial) and not (function.args or function.keywords or hasattr(function, "per_image")):
        function = function.func
    return function


def _by_place(parts: Sequence[AskedPart], of_parts: Sequence[Sequence[Any]]) -> dict[int, Any]:
    """Bring what parts have for each of their images into the order of the batch."""
    found: dict[int, Any] = {}
    for part, values in zip(parts, of_parts, strict=True):
        if len(values) != len(part.places):
            raise ValueError(f"Got {len(values)} values for {len(part.places)} images: return one for each.")
        found.update(zip(part.places, values, strict=True))
    return dict(sorted(found.items()))


def seconds_of(parts: Iterable[AskedPart], until: float) -> float:
    """Give the seconds before a moment in which at least one of these parts was asked about."""
    total, done = 0.0, 0.0
    for part in sorted(parts, key=lambda part: part.began):
        began, ended = max(part.began, done), min(part.ended, until)
        total, done = total + max(0.0, ended - began), max(done, ended)
    return total
