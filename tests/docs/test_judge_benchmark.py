"""The judge's benchmark: its simulation by hand, and a small run of all of it."""

import importlib.util
import json
import random
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def bench():
    file = ROOT / "benchmarks" / "judge.py"
    spec = importlib.util.spec_from_file_location("judge_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["judge_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_simulation_without_faults_is_rounds_of_requests(bench):
    assert bench.simulate(1000, 32, 0.5, 0.0) == pytest.approx(0.5 * 32)  # ceil(1000 / 32)
    assert bench.simulate(5, 8, 2.0, 0.0) == 2.0


def test_simulation_adds_every_pause(bench, monkeypatch):
    plan = {(0, 0): "error", (0, 1): "garbage", (0, 2): "busy", (2, 0): "busy"}
    monkeypatch.setattr(bench, "fault", lambda question, attempt, share: plan.get((question, attempt)))
    draw = random.Random(0)
    pauses = 0.5 * (1 - draw.random() / 4) + 1.0 * (1 - draw.random() / 4) + 1.0
    assert bench.simulate(1, 1, 0.25, 0.2) == pytest.approx(4 * 0.25 + pauses)
    # Two places: question 0 keeps one, the other takes 1 and then 2, which is asked twice.
    assert bench.simulate(3, 2, 0.25, 0.2) == pytest.approx(max(4 * 0.25 + pauses, 0.25 + 0.5 + 1.0))


def test_faults_are_as_frequent_as_asked_for(bench):
    kinds = [bench.fault(question, attempt, 0.2) for question in range(4000) for attempt in range(2)]
    share = sum(kind is not None for kind in kinds) / len(kinds)
    assert share == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / len(kinds)) ** 0.5)
    assert set(kinds) == {None, *bench.FAULTS}
    assert bench.fault(7, 1, 0.2) == bench.fault(7, 1, 0.2)


def test_small_run_loses_nothing(bench, tmp_path):
    file = tmp_path / "judge.json"
    bench.main(["--questions", "24", "--seconds", "0.05", "--concurrency", "8", "--results", str(file)])
    result = json.loads(file.read_text())
    assert result["wrong_or_missing"] == 0
    assert result["wall_seconds"] > 0.6 * result["simulated_seconds"]  # pauses are drawn anew
    assert 0 < result["of_which_encoding_ms"] < result["cpu_ms_per_question"]
