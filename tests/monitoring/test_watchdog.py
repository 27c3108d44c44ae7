"""The watchdog says which process is gone, hangs or has failed, and in what; here all of them are in one process."""

import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from trl_unigrpo.monitoring import watchdog
from trl_unigrpo.monitoring.progress import Phases
from trl_unigrpo.monitoring.watchdog import Watchdog, in_collective


TIMEOUT = 0.4


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def three(store):
    return [Watchdog(store, rank, 3, Phases(lambda *_: None), TIMEOUT) for rank in range(3)]


def time_passes(dogs, seconds):
    """Each of them gives its signs of life for a while."""
    for _ in range(round(seconds / dogs[0].beat)):
        for dog in dogs:
            dog.hear()
        time.sleep(dogs[0].beat)


def raised(dog):
    """Give the notes that an error of a collective gets, in the process of this watchdog."""
    error = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    dog.failed(error)
    return getattr(error, "__notes__", [])


def test_processes_that_are_well_have_nothing_to_say(three):
    for dog in three:
        dog.phases.begin("paint")
    time_passes(three, TIMEOUT)
    assert [dog.missing(TIMEOUT) for dog in three] == [[], [], []]


def test_one_that_is_gone_is_named_with_its_phase(three):
    three[1].phases.begin("reward")
    time_passes(three, TIMEOUT)
    time_passes([three[0], three[2]], TIMEOUT)
    (note,) = raised(three[0])[0].split(" Process 2, ")[:1]  # which has nothing to say either, now
    assert note.startswith("Process 1, last heard of ") and note.endswith(" in the phase 'reward', is gone.")


def test_one_that_has_failed_tells_why(three):
    three[2].phases.begin("paint")
    three[2].failed(ValueError("seven is no prompt.\nAnd more"))
    time_passes(three[:2], TIMEOUT / 2)
    (said,) = three[0].missing(TIMEOUT)
    assert said == "Process 2 ended in the phase 'paint': ValueError: seven is no prompt."
    assert said in raised(three[1])[0] and raised(three[1])[0].endswith("train(resume_from_checkpoint=True).")


def test_one_that_stays_behind_hangs_and_one_that_is_only_slower_does_not(three):
    for dog in three:
        dog.phases.begin("reward")
    for dog in three[1:]:
        dog.phases.end("reward")
    time_passes(three, TIMEOUT / 2)
    assert three[1].missing(TIMEOUT) == []
    time_passes(three, TIMEOUT)
    (said,) = three[1].missing(TIMEOUT)
    assert said.startswith("Process 0 hangs in the phase 'reward' for ") and said.endswith("waits in 'after reward'.")
    assert three[0].missing(TIMEOUT) == []
    three[0].phases.end("reward")
    time_passes(three, TIMEOUT / 2)
    assert three[1].missing(TIMEOUT) == []


def test_an_error_of_its_own_blames_nobody(three):
    time_passes(three[:1], TIMEOUT)
    error = ValueError("mine")
    three[0].failed(error)
    assert not hasattr(error, "__notes__")


def test_where_the_first_is_gone_nothing_is_said_of_the_others(three):
    time_passes(three, TIMEOUT)
    three[2].store = dist.PrefixStore("nobody", three[2].store)
    three[2].store.set_timeout(timedelta(seconds=TIMEOUT / 10))
    (note,) = raised(three[2])
    assert note.startswith("Process 0 ended in the phase 'start': it no longer answers. Checkpoints")


WAITS = """
import sys, time
import torch.distributed as dist
from trl_unigrpo.monitoring.progress import Phases
from trl_unigrpo.monitoring.watchdog import Watchdog

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
here, other = (Watchdog(store, rank, 2, Phases(lambda *_: None), 0.4) for rank in (0, 1))
here.watch()
time.sleep(60)  # as in a collective that never ends
"""


def test_a_process_that_waits_for_nobody_ends_with_the_sentence():
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Process 0: Process 1, last heard of 0 s ago in the phase 'start', is gone." in done.stderr
    assert "go on from the last with train(resume_from_checkpoint=True)" in done.stderr


def test_one_that_works_while_others_wait_for_it_in_the_same_phase_hangs(three, monkeypatch):
    monkeypatch.setattr(watchdog, "in_collective", lambda worker: worker == "waits")
    for dog, worker in zip(three, ("works", "waits", "waits"), strict=True):
        dog._worker = worker
        dog.phases.begin("reward")
    time_passes(three, 1.5 * TIMEOUT)
    (said,) = three[1].missing(TIMEOUT)
    assert said.startswith("Process 0 hangs in the phase 'reward' for ")
    assert three[0].missing(TIMEOUT) == []


def test_a_thread_in_a_collective_is_seen():
    seen = []

    class Pickled:
        def __reduce__(self):
            seen.append(in_collective(threading.get_ident()))
            return int, ()

    dist.distributed_c10d._object_to_tensor(Pickled(), torch.device("cpu"), None)
    assert seen == [True]
    assert not in_collective(threading.get_ident())


def test_an_error_is_told_of_the_phase_that_it_came_up_in(three):
    with pytest.raises(KeyError), three[2].phases("update"), three[2].phases("reward"):
        raise KeyError("no such judge")
    three[2].failed(KeyError("no such judge"))
    time_passes(three[:2], TIMEOUT / 2)
    assert three[0].missing(TIMEOUT) == ["Process 2 ended in the phase 'reward': KeyError: 'no such judge'"]
