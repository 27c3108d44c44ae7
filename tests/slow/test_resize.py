"""A checkpoint of two processes goes on in four that divide the same batch."""

import pytest

from tests.helpers.resuming import distance, in_processes
from tests.helpers.tiny_unified import moved, tiny_bagel, weights


pytestmark = pytest.mark.slow


def test_run_of_two_processes_goes_on_in_four(tmp_path):
    whole = in_processes(2, tmp_path / "two")[0]
    resumed = in_processes(4, tmp_path / "four", tmp_path / "two" / "run" / "checkpoint-2")
    assert [found["warned"] for found in resumed] == [0] * 4
    assert all(not moved(resumed[0]["weights"], found["weights"]) for found in resumed)
    assert distance(weights(tiny_bagel()), whole["weights"], resumed[0]["weights"]) < 1e-5
    sampled_anew = in_processes(4, tmp_path / "inside", tmp_path / "two" / "run" / "checkpoint-3")
    assert [found["warned"] for found in sampled_anew] == [1] * 4
    assert [found["step"] for found in sampled_anew] == [4] * 4
