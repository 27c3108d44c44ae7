"""The benchmark of the pipelines runs, small, and nothing is computed twice."""

import json
import sys

import pytest

from tests.helpers.benchmarks import load


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pipeline_step(tmp_path, monkeypatch, checkpointing):
    script, file = load("pipeline_step"), tmp_path / "results.json"
    small = {"image_size": 64, "transformer": {**script.SIZES["tiny"]["transformer"], "num_layers": 2}}
    monkeypatch.setitem(script.SIZES, "tiny", {**script.SIZES["tiny"], **small})
    options = ["--batch", "2", "--num-inference-steps", "4", "--repeats", "1", "--results", str(file)]
    monkeypatch.setattr(sys, "argv", ["pipeline_step", *options, *(["--checkpointing"] if checkpointing else [])])
    script.main()
    found = json.loads(file.read_text())
    assert 0 < found["replay_overhead"] < 1
    # Checkpointing pays a further forward for each backward; nothing else is added.
    assert 1 <= found["flops_ratio"] <= (1.35 if checkpointing else 1.10)
    assert (found["flops_ratio"] > 1.15) == checkpointing
