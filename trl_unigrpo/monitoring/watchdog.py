"""A watchdog over the processes of a run: where one is gone or hangs, the others say which, and in what, and end."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .progress import Phases


BEAT = 2.0
"""Seconds from one sign of life to the next; with hundreds of processes longer, as each hears all others."""
SILENT = 3
"""Missing signs of life of a process that is gone."""
ANSWER = 10.0
"""Seconds that the store has to answer."""
GRACE = 30.0
"""Seconds that a collective has to raise by itself before the process is ended."""
AGAIN = "Checkpoints are whole: go on from the last with train(resume_from_checkpoint=True)."


@dataclass
class Heard:
    """
    The last that was heard of a process, and when that changed.

    Attributes:
        beat: number of its sign of life.
        begun: how many phases it has begun and ended.
        phase: that it is in.
        waits: whether it is in a collective.
        error: that has ended it, if any.
    """

    beat: int = 0
    begun: int = 0
    phase: str = ""
    waits: bool = False
    error: str = ""
    since_beat: float = field(default_factory=time.monotonic)
    since_begun: float = field(default_factory=time.monotonic)

    def take(self, said: dict[str, Any]) -> None:
        """Take note of what a process says."""
        now = time.monotonic()
        if said["beat"] != self.beat:
            self.since_beat = now
        if (said["begun"], said["waits"]) != (self.begun, self.waits):
            self.since_begun = now
        for name, value in said.items():
            setattr(self, name, value)


class Watchdog:
    """
    Tells the other processes how far this one is, and watches how far they are, in a thread of its own.

    A collective ends by itself where a process has died or does not come: at once, or after the timeout. Which one it
    was, and what it was doing by its last sign of life, no collective says; and not each ends.

    Args:
        store: that all processes reach.
        rank, world: number of this process, and how many there are.
        phases: of this process.
        timeout: seconds, that of the collectives: `ddp_timeout`.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, phases: Phases, timeout: float):
        self.store, self.rank, self.phases, self.timeout = store, rank, phases, timeout
        self.beat = min(max(BEAT, world / 16), timeout / 4)
        self._own = Heard()
        self._others = {other: Heard() for other in range(world) if other != rank}
        self._over = threading.Event()
        self._worker = threading.get_ident()
        self._say()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @classmethod
    def start(cls, accelerator: Accelerator, phases: Phases, timeout: float) -> "Watchdog":
        """Begin to watch; all processes must call it."""
        rank, world = accelerator.process_index, accelerator.num_processes
        host, wait = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=ANSWER)
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait) if rank == 0 else None
        (port,) = broadcast_object_list([store and store.port])
        if store is None:
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        dog = cls(store, rank, world, phases, timeout)
        accelerator.wait_for_everyone()  # all have said something
        dog.watch()
        return dog

    def watch(self) -> None:
        """Begin the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2 * ANSWER)

    def failed(self, error: BaseException) -> None:
        """Tell the others what ends this process, and note in the error which of them it may come from."""
        self.stop()
        self._own.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        for _ in range(SILENT + 1):  # as long as they need to hear it, and this process to see who is silent
            if self._thread.is_alive() or not self.hear():  # it still waits for an answer
                self._without_store()
                break
            time.sleep(self.beat)
        if isinstance(error, RuntimeError) and (found := self.missing(SILENT * self.beat)):
            error.add_note(" ".join([*found, AGAIN]))

    def missing(self, patience: float) -> list[str]:
        """
        Say in a sentence for each which processes have ended, are silent, or are behind this one and stay there.

        Args:
            patience: seconds from which they are.
        """
        now, found = time.monotonic(), []
        for other, heard in self._others.items():
            silent, waits = now - heard.since_beat, now - max(heard.since_begun, self._own.since_begun)
            where = f"in the phase {heard.phase!r}"
            if heard.error:
                found.append(f"Process {other} ended {where}: {heard.error}")
            elif silent >= patience:
                found.append(f"Process {other}, last heard of {silent:.0f} s ago {where}, is gone.")
            elif (heard.begun, heard.waits) < (self._own.begun, self._own.waits) and waits >= self.timeout:
                found.append(
                    f"Process {other} hangs {where} for {waits:.0f} s, while this one waits in {self._own.phase!r}."
                )
        return found

    def _watch(self) -> None:
        said = 0.0
        while not self._over.wait(self.beat):
            if not self.hear():
                self._without_store()
            found = self.missing(self.timeout)
            if found and not said:
                said = time.monotonic()
                print(" ".join([f"Process {self.rank}:", *found, AGAIN]), file=sys.stderr, flush=True)
            elif found and time.monotonic() - said > min(GRACE, self.timeout):
                os._exit(1)  # the thread that waits can't be woken
            elif not found:
                said = 0.0

    def _say(self) -> None:
        begun, phase = self.phases.place
        waits = in_collective(self._worker)
        self._own.take({"beat": self._own.beat + 1, "begun": begun, "phase": phase, "waits": waits})
        told = {name: getattr(self._own, name) for name in ("beat", "begun", "phase", "waits", "error")}
        self.store.set(str(self.rank), json.dumps(told))

    def _without_store(self) -> None:
        """Take note that the first process is gone, and that of the others nothing is known."""
        self._others = {other: heard for other, heard in self._others.items() if other == 0}
        for heard in self._others.values():
            heard.error = heard.error or "it no longer answers."

    def hear(self) -> bool:
        """Say how far this process is and hear of others; False where the first, which has the store, is not there."""
        try:
            self._say()
            told = self.store.multi_get([str(other) for other in self._others])
        except RuntimeError:
            return False
        for heard, one in zip(self._others.values(), told, strict=True):
            heard.take(json.loads(one))
        return True


def in_collective(thread: int) -> bool:
    """Say whether a thread of this process is in a call of torch.distributed."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_filename != dist.distributed_c10d.__file__:
        frame = frame.f_back
    return frame is not None


@contextmanager
def under_watch(accelerator: Accelerator, phases: Phases, timeout: float) -> Iterator[None]:
    """Have a watchdog over a run, where it has several processes."""
    if accelerator.num_processes == 1 or not dist.is_initialized():
        yield
        return
    dog = Watchdog.start(accelerator, phases, timeout)
    try:
        yield
    except Exception as error:
        dog.failed(error)
        raise
    else:
        dog.stop()
        accelerator.wait_for_everyone()  # the first keeps the store until nobody asks any more
    finally:
        dog.stop()
