"""Processes of their own: their order, what a failure and a signal do, and two commands on one folder."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from trl_unigrpo.experiments.paper.jobs import (
    Job,
    check_same,
    grid_jobs,
    seconds_left,
    write_once,
)
from trl_unigrpo.experiments.paper.processes import run_all, take
from trl_unigrpo.experiments.paper.systems import SYSTEMS


NAMES = ("base", "sft", "unigrpo", "text_grpo")
JOBS = [Job(name, 0) for name in NAMES]

# What a run leaves, without the training: times of start and end beside it.
WORK = """
import json, os, sys, time
from pathlib import Path
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
(folder / "pid").write_text(str(os.getpid()))
began = time.time()
time.sleep(seconds)
(folder / "times.json").write_text(json.dumps([began, time.time()]))
(folder / "run.json").write_text(json.dumps({"threads": os.environ["OMP_NUM_THREADS"]}))
"""


class Record:
    """A watcher that keeps what it is told."""

    def __init__(self):
        self.events = []

    def started(self, job):
        self.events.append(("started", job))

    def finished(self, job):
        self.events.append(("finished", job))

    def failed(self, job, why):
        self.events.append(("failed", job))

    def tick(self, running):
        pass

    def of(self, kind):
        return [job for name, job in self.events if name == kind]


def work(output, seconds=0.1, fails=()):
    """The command of a job; those in `fails` print a line and raise."""

    def command(job):
        code = f"print('the line before'); raise SystemExit('{job.system} broke')" if job in fails else WORK
        return [sys.executable, "-c", code, str(job.folder(output)), str(seconds)]

    return command


def run(jobs, output, number=2, **options):
    watcher = Record()
    outcome = run_all(jobs, output, number, work(output, **options), watcher, pause=0.02)
    return outcome, watcher


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def test_in_order_and_so_many_at_a_time(tmp_path):
    outcome, watcher = run(JOBS, tmp_path, number=2, seconds=0.3)
    assert outcome.failed == {} and outcome.signal is None
    assert watcher.of("started") == JOBS and sorted(watcher.of("finished"), key=JOBS.index) == JOBS
    times = [json.loads((job.folder(tmp_path) / "times.json").read_text()) for job in JOBS]
    at_once = [sum(began <= moment < ended for began, ended in times) for moment, _ in times]
    assert max(at_once) == 2
    assert json.loads((JOBS[0].folder(tmp_path) / "run.json").read_text()) == {"threads": "1"}


def test_a_failure_stops_no_other(tmp_path):
    outcome, watcher = run(JOBS, tmp_path, number=1, fails=[JOBS[1]])
    assert list(outcome.failed) == [JOBS[1]] and watcher.of("failed") == [JOBS[1]]
    assert "exit code 1" in outcome.failed[JOBS[1]] and "sft broke" in outcome.failed[JOBS[1]]
    assert "the line before" in (JOBS[1].folder(tmp_path) / "log.txt").read_text()
    assert watcher.of("finished") == [JOBS[0], *JOBS[2:]]


def test_a_run_without_its_result_has_failed(tmp_path):
    outcome = run_all(JOBS[:1], tmp_path, 1, lambda job: [sys.executable, "-c", ""], Record(), pause=0.02)
    assert "exit code 0" in outcome.failed[JOBS[0]]


def test_what_goes_on_from_another_waits_for_it_and_fails_with_it(tmp_path):
    jobs = grid_jobs([SYSTEMS["two_stage"]], [0, 1])
    first, second = jobs[0], jobs[1]
    assert second.start == first
    outcome, watcher = run(jobs, tmp_path, number=4, fails=[first])
    assert list(outcome.failed) == [first, second] and "two_stage_refl seed 0" in outcome.failed[second]
    assert second not in watcher.of("started")
    assert watcher.events.index(("finished", jobs[2])) < watcher.events.index(("started", jobs[3]))


def test_finished_runs_are_not_done_again(tmp_path):
    run(JOBS[:2], tmp_path)
    before = (JOBS[0].folder(tmp_path) / "run.json").stat().st_mtime_ns
    _, watcher = run(JOBS, tmp_path)
    assert sorted(watcher.of("started"), key=JOBS.index) == JOBS[2:]
    assert (JOBS[0].folder(tmp_path) / "run.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_process_alive(tmp_path, number):
    files = [job.folder(tmp_path) / "pid" for job in JOBS[:2]]
    before = signal.getsignal(number)

    def interrupt():
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    outcome, watcher = run(JOBS, tmp_path, seconds=60)
    thread.join()
    assert outcome.signal == number and time.monotonic() - began < 20
    assert outcome.failed == {} and watcher.of("started") == JOBS[:2]
    assert not any(alive(int(file.read_text())) for file in files)
    assert signal.getsignal(number) == before
    assert not any(job.finished(tmp_path) for job in JOBS)
    # The locks are free again, and the runs are done from their start.
    assert set(run(JOBS[:2], tmp_path)[1].of("finished")) == set(JOBS[:2])


def test_a_process_that_hears_no_sigterm_is_killed(tmp_path):
    code = """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(60)
    """
    file = tmp_path / "pid"
    command = [sys.executable, "-c", textwrap.dedent(code), str(file)]

    def interrupt():
        wait_for(lambda: file.exists() and file.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    run_all(JOBS[:1], tmp_path, 1, lambda job: command, Record(), pause=0.02)
    thread.join()
    assert time.monotonic() - began < 30
    assert not alive(int(file.read_text()))


HOLD = """
import sys, time
from pathlib import Path
from trl_unigrpo.experiments.paper.jobs import Job
from trl_unigrpo.experiments.paper.processes import take
output, job = Path(sys.argv[1]), Job("base", 0)
lock = take(job, output)
print("held", flush=True)
sys.stdin.readline()
folder = job.folder(output)
folder.mkdir(parents=True)
if sys.argv[2] == "finishes":
    (folder / "run.json").write_text("{}")
lock.release()
"""


@pytest.mark.parametrize("other", ["finishes", "gives up"])
def test_a_run_that_another_command_does_is_left_to_it(tmp_path, other):
    """While it is held the others go on; if it comes to nothing it is done here."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert take(JOBS[0], tmp_path) is None

    def let_go():
        wait_for(lambda: all(job.finished(tmp_path) for job in JOBS[1:]))
        holder.communicate("\n")

    thread = threading.Thread(target=let_go)
    thread.start()
    outcome, watcher = run(JOBS, tmp_path, number=1)
    thread.join()
    assert outcome.failed == {} and sorted(watcher.of("finished"), key=JOBS.index) == JOBS
    assert watcher.of("started") == (JOBS[1:] if other == "finishes" else [*JOBS[1:], JOBS[0]])


def test_time_left(tmp_path):
    jobs = grid_jobs([SYSTEMS[name] for name in ("sft", "unigrpo", "text_grpo")], [0, 1, 2])
    assert seconds_left(jobs, tmp_path, 2) is None

    def finish(job, seconds):
        job.folder(tmp_path).mkdir(parents=True)
        (job.folder(tmp_path) / "run.json").write_text(json.dumps({"system": job.system, "seconds": seconds}))

    finish(Job("unigrpo", 0), 300)
    finish(Job("unigrpo", 1), 340)
    # 1 of unigrpo, 3 of text_grpo, which is of the same method, and 3 of sft, of which nothing is known.
    assert seconds_left(jobs, tmp_path, 1) == pytest.approx(7 * 320)
    finish(Job("sft", 0), 60)
    finish(Job("text_grpo", 0), 200)
    assert seconds_left(jobs, tmp_path, 2) == pytest.approx((320 + 2 * 200 + 2 * 60) / 2)
    for job in jobs:
        if not job.finished(tmp_path):
            finish(job, 1)
    assert seconds_left(jobs, tmp_path, 2) == 0


def test_what_was_made_otherwise_is_named(tmp_path):
    job = JOBS[2]
    job.folder(tmp_path).mkdir(parents=True)
    (job.folder(tmp_path) / "run.json").write_text(json.dumps({"settings": {"max_steps": 70, "seed": 1}}))
    check_same(job, tmp_path, {"max_steps": 70, "seed": 1})
    with pytest.raises(ValueError, match="max_steps=70 there, 280 now.*--output-dir"):
        check_same(job, tmp_path, {"max_steps": 280, "seed": 1})
    write_once(tmp_path / "prompts.json", {"prompts": ["a"]})
    write_once(tmp_path / "prompts.json", {"prompts": ["a"]})
    with pytest.raises(ValueError, match="other prompts.*--output-dir"):
        write_once(tmp_path / "prompts.json", {"prompts": ["b"]})
