"""Work beside the training, in its order."""

import logging
import queue
import threading
from collections.abc import Callable


logger = logging.getLogger(__name__)


class Worker:
    """
    One thread that does one piece of work after the other. What fails is logged; a training must not end for a page.

    Args:
        what: named in the log where a piece of work fails.
        waiting: pieces of work that may wait; at more, whoever brings the next waits too.
    """

    def __init__(self, what: str, waiting: int = 4):
        self.what = what
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(waiting)
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Have it done soon, after all that was asked before."""
        if self._thread is None:
            # A daemon: where a run ends without `wait`, the rest of a page is not worth keeping the process for.
            self._thread = threading.Thread(target=self._run, name=self.what, daemon=True)
            self._thread.start()
        self._queue.put(work)

    def wait(self) -> None:
        """Return when all work is done. The thread ends with it: it would keep alive what it worked on."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        for work in iter(self._queue.get, None):
            try:
                work()
            except Exception:
                logger.exception("%s failed. Training goes on.", self.what)
            del work  # while it waits for the next
