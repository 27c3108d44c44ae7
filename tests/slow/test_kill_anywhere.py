"""A run that is killed anywhere, and again while it goes on, ends to the bit where it would have ended."""

import random
import time

import pytest

from tests.helpers.killed import STEPS, left_by, start
from trl_unigrpo.trainers.whole_checkpoints import checkpoints


pytestmark = pytest.mark.slow

PATIENCE = 300  # seconds that no session takes
KILLS = {1: 70, 2: 30}  # processes -> of the hundred
IN_A_RUN = 5  # kills that a run meets at most before it may end


def wait(started):
    """Wait until all processes have ended; returns whether all ended well. What is left of a killed run is killed."""
    for process in reversed(started):  # the last one is the victim
        process.join(PATIENCE)
        assert process.exitcode is not None, "it hangs"
    return all(process.exitcode == 0 for process in started)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Processes -> what a run leaves that nothing interrupts, its seconds, and its writes and events."""
    found = {}
    for processes in KILLS:
        folder = tmp_path_factory.mktemp("whole") / "run"
        begun = time.monotonic()
        assert wait(start(processes, folder)), folder.with_name("run.0.log").read_text()
        count = int(folder.with_name(f"run.{processes - 1}.count").read_text())
        found[processes] = left_by(folder, processes), time.monotonic() - begun, count
    return found


@pytest.mark.parametrize("processes", KILLS)
def test_a_run_that_is_killed_anywhere_goes_on_as_if_it_had_not(whole, tmp_path, processes):
    expected, seconds, count = whole[processes]
    draw, killed, runs = random.Random(processes), 0, 0
    while killed < KILLS[processes]:
        runs += 1
        folder, met = tmp_path / str(runs) / "run", 0
        folder.parent.mkdir()
        ended = False
        while not ended:
            due = met < IN_A_RUN and killed < KILLS[processes]
            left = (
                1
                - (int(checkpoints(folder)[0].name.removeprefix("checkpoint-")) if checkpoints(folder) else 0) / STEPS
            )
            aimed = due and draw.random() < 0.5
            started = start(processes, folder, draw.randint(1, max(2, int(count * left))) if aimed else None)
            if due and not aimed:
                time.sleep(draw.uniform(0, 0.3 + seconds * left))
                for process in draw.sample(started, draw.randint(1, processes)):
                    process.kill()
            ended = wait(started)
            met, killed = met + (not ended), killed + (not ended)
            assert due or ended, folder.with_name("run.0.log").read_text()[-3000:]
        found = left_by(folder, processes)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == value, (name, folder)
    print(f"{killed} kills in {runs} runs of {processes} processes: all equal")
