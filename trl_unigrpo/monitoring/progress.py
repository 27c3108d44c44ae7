"""Seconds of the phases of a step, and a bar for those that are slow."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


SLOW = 10.0  # seconds from which a phase gets a bar


class Phases:
    """
    Clocks of phases, of which the innermost alone runs: sampling within an update is not the update's time.

    Args:
        record: called with a phase's name and its seconds when it ends.
        shows: whether slow phases get a bar below the training's.
        slow: seconds from which a phase is slow. One that was slow the last time has its bar at once, and that tells
            how much is left.
    """

    def __init__(self, record: Callable[[str, float], None], shows: bool = False, slow: float = SLOW):
        self.record, self.shows, self.slow = record, shows, slow
        self._running: list[str] = []
        self._since = 0.0
        self._turns, self._place = 0, "start"
        self._seconds: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._bars: dict[str, _Bar] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block of code as a phase."""
        self.begin(name)
        try:
            yield
        except BaseException:
            place = self._place
            self.end(name)
            self._place = place  # where the error came up
            raise
        self.end(name)

    @property
    def place(self) -> tuple[int, str]:
        """Count the phases that have begun and ended so far, and name the one that runs, or that was the last."""
        return self._turns, self._place

    def begin(self, name: str) -> None:
        """Start a phase, unless it runs already."""
        if name in self._running:
            return
        self._accrue()
        self._running.append(name)
        self._turns, self._place = self._turns + 1, name
        if self.shows:
            self._bars[name] = _Bar(name, self._last.get(name, 0.0), self.slow, len(self._running))

    def end(self, name: str) -> None:
        """End a phase, and those that began within it; does nothing for one that does not run."""
        while name in self._running:
            self._accrue()
            ended = self._running.pop()
            self._turns, self._place = self._turns + 1, self._running[-1] if self._running else f"after {ended}"
            seconds = self._last[ended] = self._seconds.pop(ended)
            if ended in self._bars:
                self._bars.pop(ended).close()
            self.record(ended, seconds)

    def stop(self) -> None:
        """Drop the phases that run, as after an error: their seconds say nothing."""
        for bar in self._bars.values():
            bar.close()
        for of_running in (self._running, self._seconds, self._bars):
            of_running.clear()

    def _accrue(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


class _Bar:
    """
    A bar of seconds, drawn by a thread of its own while the phase works.

    Args:
        expected: seconds that it took the last time, 0 if there was none.
        position: lines below the training's bar.
    """

    def __init__(self, name: str, expected: float, slow: float, position: int):
        self.name, self.expected, self.position = name, expected, position
        self.wait = 0.0 if expected > slow else slow
        self._started = time.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _draw(self) -> None:
        if self._over.wait(self.wait):
            return
        total = round(self.expected) or None
        with tqdm(total=total, desc=self.name, unit="s", position=self.position, leave=False) as bar:
            while not self._over.wait(0.5):
                elapsed = int(time.perf_counter() - self._started)
                if total is not None and elapsed > total:
                    bar.total = total = None  # slower than the last time: how much is left is not known
                bar.update(elapsed - bar.n)
