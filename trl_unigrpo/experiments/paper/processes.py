"""Runs as processes of their own, several at a time: one that fails stops no other, and none outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from .jobs import Job


LOCKS = ".locks"
LOG_TAIL = 15


class RunWatcher(Protocol):
    """What is told of each run."""

    def started(self, job: Job) -> None: ...
    def finished(self, job: Job) -> None: ...
    def failed(self, job: Job, why: str) -> None: ...
    def tick(self, running: Sequence[Job]) -> None: ...


@dataclass
class Outcome:
    """
    Attributes:
        failed: what failed, and why: the end of its log, or the run that it needed.
        signal: the number of the signal that ended it all, or None.
    """

    failed: dict[Job, str] = field(default_factory=dict)
    signal: int | None = None


def run_all(
    jobs: Sequence[Job],
    output: Path,
    number: int,
    command: Callable[[Job], Sequence[str]],
    watcher: RunWatcher,
    pause: float = 0.2,
) -> Outcome:
    """
    Do the jobs that are not finished, `number` at a time, in their order as far as their starts allow.

    Each is a process that writes `run.json` into its folder; what it
    prints goes to `log.txt` there. A run that another command is doing is left to it. The first SIGINT or SIGTERM ends
    all processes.

    Args:
        command: job -> the process to start.
        pause: seconds between two looks at the processes.
    """
    outcome, pending = Outcome(), list(jobs)
    running: dict[Job, tuple[subprocess.Popen[bytes], FileLock]] = {}

    def fail(job: Job, why: str) -> None:
        outcome.failed[job] = why
        watcher.failed(job, why)

    def settle() -> None:
        """Note what has ended, and drop what another command has done or what can't be done any more."""
        for job, (process, lock) in list(running.items()):
            if process.poll() is not None:
                process.communicate()  # closes the pipe
                del running[job]
                lock.release()
                if process.returncode == 0 and job.finished(output):
                    watcher.finished(job)
                else:
                    fail(job, f"exit code {process.returncode}\n{log_tail(job.folder(output))}")
        for job in list(pending):
            if job.finished(output):
                watcher.finished(job)
            elif job.start in outcome.failed:
                fail(job, f"it goes on from {job.start}, which failed")
            else:
                continue
            pending.remove(job)

    def begin() -> None:
        """Start what can be started."""
        for job in list(pending):
            if len(running) >= number:
                return
            if job.start is not None and (job.start in running or not job.start.finished(output)):
                continue
            lock = take(job, output)
            if lock is None:
                continue
            pending.remove(job)
            if job.finished(output):  # by another command, after the last look
                lock.release()
                watcher.finished(job)
                continue
            running[job] = start(command(job), job.folder(output)), lock
            watcher.started(job)

    with signals_noted() as received:
        try:
            while not received:
                settle()
                begin()
                watcher.tick(list(running))
                if not pending and not running:
                    break
                time.sleep(pause)
        finally:
            for process, lock in running.values():
                end(process)
                lock.release()
    outcome.signal = received[0] if received else None
    return outcome


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """
    A process of one thread, whose output goes to `log.txt`.

    It gets a pipe as standard input that only this process holds, so that it can tell when this one is gone, and a
    session of its own: Ctrl-C reaches this process alone, which ends it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes], patience: float = 2.0) -> None:
    """End a process at once, and wait until it has ended."""
    process.terminate()
    try:
        process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def take(job: Job, output: Path) -> FileLock | None:
    """The lock of a run, held; None where another command holds it."""
    folder = output / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{job.folder(output).relative_to(output).as_posix().replace('/', '-')}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def log_tail(folder: Path, lines: int = LOG_TAIL) -> str:
    """The end of a run's log."""
    file = folder / "log.txt"
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if file.exists() else ""


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Instead of raising, SIGINT and SIGTERM are appended to the list: no process is lost between start and note."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
