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
    """One that is told of each run."""

    def started(self, job: Job) -> None: ...
    def finished(self, job: Job) -> None: ...
    def failed(self, job: Job, why: str) -> None: ...
    def tick(self, running: Sequence[Job]) -> None: ...


@dataclass
class Outcome:
    """
    Attributes:
        failed: the jobs that failed, and why: the end of its log, or the run that it needed.
        signal: the number of the signal that ended it all, or None.
    """

    failed: dict[Job, str] = field(default_factory=dict)
    signal: int | None = None


@dataclass
class Work:
    """
    The jobs that are being done: those that wait, those that run, and what came of the others.

    Attributes:
        pending: in the order in which to do them.
        running: each with its process and the lock that keeps other commands from it.
    """

    output: Path
    pending: list[Job]
    watcher: RunWatcher
    running: dict[Job, tuple[subprocess.Popen[bytes], FileLock]] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def left(self) -> bool:
        return bool(self.pending or self.running)

    def fail(self, job: Job, why: str) -> None:
        self.outcome.failed[job] = why
        self.watcher.failed(job, why)

    def note_ended(self) -> None:
        """Note which processes have ended, and how."""
        for job, (process, lock) in list(self.running.items()):
            if process.poll() is None:
                continue
            process.communicate()  # closes the pipe
            del self.running[job]
            lock.release()
            if process.returncode == 0 and job.finished(self.output):
                self.watcher.finished(job)
            else:
                self.fail(job, f"exit code {process.returncode}\n{log_tail(job.folder(self.output))}")

    def drop_settled(self) -> None:
        """Take out what another command has done, and what can't be done any more."""
        for job in list(self.pending):
            if job.finished(self.output):
                self.watcher.finished(job)
            elif job.start in self.outcome.failed:
                self.fail(job, f"it goes on from {job.start}, which failed")
            else:
                continue
            self.pending.remove(job)

    def begin(self, number: int, command: Callable[[Job], Sequence[str]]) -> None:
        """Start what can be started, up to so many at a time."""
        for job in list(self.pending):
            if len(self.running) >= number:
                return
            if job.start is not None and (job.start in self.running or not job.start.finished(self.output)):
                continue
            lock = take(job, self.output)
            if lock is None:
                continue
            self.pending.remove(job)
            if job.finished(self.output):  # by another command, after the last look
                lock.release()
                self.watcher.finished(job)
                continue
            self.running[job] = start(command(job), job.folder(self.output)), lock
            self.watcher.started(job)

    def end_all(self) -> None:
        """End all processes, and let go of their jobs."""
        for process, lock in self.running.values():
            end(process)
            lock.release()


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

    Each is a process that writes `run.json` into its folder; what it prints goes to `log.txt` there. A run that
    another command is doing is left to it. The first SIGINT or SIGTERM ends all processes.

    Args:
        command: job -> the process to start.
        pause: seconds between two looks at the processes.
    """
    work = Work(output, list(jobs), watcher)
    with signals_noted() as received:
        try:
            while not received:
                work.note_ended()
                work.drop_settled()
                work.begin(number, command)
                watcher.tick(list(work.running))
                if not work.left:
                    break
                time.sleep(pause)
        finally:
            work.end_all()
    work.outcome.signal = received[0] if received else None
    return work.outcome


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """
    Start a process of one thread, whose output goes to `log.txt`.

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
    """Take the lock of a run; None where another command holds it."""
    folder = output / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{job.folder(output).relative_to(output).as_posix().replace('/', '-')}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def log_tail(folder: Path, lines: int = LOG_TAIL) -> str:
    """Read the end of a run's log."""
    file = folder / "log.txt"
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if file.exists() else ""


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Append SIGINT and SIGTERM to the list instead of raising: no process is lost between start and note."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
