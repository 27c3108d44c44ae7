"""The benchmark of judging while painting: its simulation by hand, and a small run of all of it."""

import json

import pytest

from tests.helpers.benchmarks import load


def test_simulation_by_hand():
    simulate = load("overlap").simulate
    assert simulate([0.0], 10, 4, 1.0) == 3.0  # rounds of four
    assert simulate([1.0, 5.0], 4, 4, 1.0) == 6.0  # a judge that waits for the painter
    assert simulate([1.0, 2.0, 3.0], 4, 2, 1.0) == 1.0 + 12 / 2  # a painter that is long ready
    assert simulate([1.0, 2.0], 3, 2, 1.0) == 4.0  # the third of the first chunk goes beside the next ones


def test_small_run_judges_while_it_paints(tmp_path):
    file = tmp_path / "overlap.json"
    small = ["--images", "16", "--per-chunk", "4", "--connections", "4", "--seconds", "0.1"]
    load("overlap").main([*small, "--results", str(file)])
    found = json.loads(file.read_text())
    early, late = found["with_overlap"], found["without_overlap"]
    assert late["judging_before_seconds"] == 0 < 0.2 < early["judging_before_seconds"] < early["painting_seconds"]
    assert late["waiting_seconds"] >= found["seconds_to_judge_all"] == pytest.approx(0.4)
    assert 0.1 <= early["waiting_seconds"] < late["waiting_seconds"]
    assert found["simulation"]["added_by_judging"] == pytest.approx(0.25)  # the last chunk's judging
