"""A run that is killed anywhere, and again while it goes on, ends to the bit where it would have ended."""

import random
import signal
import time

import pytest

from tests.helpers.killed import STEPS, left_by, start
from trl_unigrpo.trainers.whole_checkpoints import checkpoints


pytestmark = pytest.mark.slow

PATIENCE = 300  # seconds that no session takes
KILLS = {1: 70, 2: 30}  # processes -> of the hundred
IN_A_RUN = 5  # kills that a run meets at most before it may end


def wait(started):
    """Wait until all processes have ended; returns whether all ended well, and else makes sure that one was killed."""
    for process in started:
        process.join(PATIENCE)
    codes = [process.exitcode for process in started]
    assert None not in codes, "a process hangs"
    assert not any(codes) or -signal.SIGKILL in codes, codes
    return not any(codes)


@pytest.fixture(scope="module", params=KILLS)
def whole(request, tmp_path_factory):
    """Processes, what a run of them leaves that nothing interrupts, its seconds, and the writes and events of each."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    assert wait(start(request.param, folder)), folder.with_name("run.0.log").read_text()
    counts = [int(folder.with_name(f"run.{rank}.count").read_text()) for rank in range(request.param)]
    return request.param, left_by(folder), time.monotonic() - begun, counts


def test_a_run_that_is_killed_anywhere_goes_on_as_if_it_had_not(whole, tmp_path):
    processes, expected, seconds, counts = whole
    draw, killed, runs = random.Random(processes), 0, 0
    while killed < KILLS[processes]:
        runs += 1
        folder, met, ended = tmp_path / str(runs) / "run", 0, False
        folder.parent.mkdir()
        while not ended:
            due = met < IN_A_RUN and killed < KILLS[processes]
            done = [int(one.name.removeprefix("checkpoint-")) for one in checkpoints(folder)]
            left = 1 - max(done, default=0) / STEPS
            aimed, victim = due and draw.random() < 0.5, draw.randrange(processes)
            started = start(
                processes, folder, {victim: draw.randint(1, 2 + int(counts[victim] * left))} if aimed else {}
            )
            if due and not aimed:
                time.sleep(draw.uniform(0, 0.3 + seconds * left))
                for process in draw.sample(started, draw.randint(1, processes)):
                    process.kill()
            ended = wait(started)
            met, killed = met + (not ended), killed + (not ended)
        found = left_by(folder)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == value, (name, folder)
    print(f"{killed} kills in {runs} runs of {processes} processes: all ended alike")
