"""The driver that proves the real sizes on a GPU: what it plans, skips and writes, and a rehearsal of all of it."""

import json
import re
from dataclasses import replace

import pytest

from tests.helpers.benchmarks import load
from tests.helpers.paths import ROOT


MACHINE = {
    "device": "a GPU",
    "gib": 79.2,
    "matmul_tflops": 790.0,
    "estimated_gib": {"512-bf16": 38.2, "512-nf4": 20.9, "1024-bf16": 44.2, "1024-nf4": 26.8},
}


@pytest.fixture
def proof():
    return load("gpu_proof")


def fake(proof, monkeypatch, **commands):
    """Stages that run a line of Python each; the machine is described without a GPU."""
    described = f"import json, sys; json.dump({MACHINE}, open(sys.argv[1], 'w'))"
    stage = replace(proof.STAGES["checks"], told=lambda result: "told")
    stages = {name: replace(stage, command=f'-c "{line}" {{results}}') for name, line in commands.items()}
    machine = replace(stage, command=f'-c "{described}" {{results}}')
    monkeypatch.setattr(proof, "STAGES", {"machine": machine, **stages})


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_without_a_gpu_it_says_what_would_run(proof, monkeypatch, capsys):
    monkeypatch.setattr(proof, "has_gpu", lambda: False)
    assert proof.main([]) == 0
    out = capsys.readouterr().out
    assert "No GPU found" in out
    assert all(name in out for name in proof.STAGES)
    assert str(sum(stage.seconds for stage in proof.STAGES.values())) in out


def test_each_stage_leaves_a_line_also_one_that_fails_or_takes_too_long(proof, monkeypatch, tmp_path):
    write = "import json, sys; json.dump(1, open(sys.argv[1], 'w'))"
    crash, slow = f"{write}; print('so far'); raise SystemExit(3)", "import time; time.sleep(60)"
    fake(proof, monkeypatch, fails=crash, works=write, hangs=slow)
    monkeypatch.setattr(proof, "expected_seconds", lambda stage, machine: 1)
    file = tmp_path / "proof.jsonl"
    found = dict(proof.prove(["fails", "works", "hangs"], rehearse=False, budget=8, file=file))
    assert [line["status"] for line in found.values()] == ["passed", "failed with 3", "passed", "out of time"]
    assert found["fails"]["result"] == found["works"]["result"] == 1
    assert "so far" in found["fails"]["log"]
    assert [line["stage"] for line in lines(file)] == ["machine", "fails", "works", "hangs"]
    assert {line["hardware"] for line in lines(file)} == {"a GPU"}


@pytest.mark.parametrize(
    ("memory", "seconds", "rate", "said"),
    [
        (79.2, None, 790.0, None),
        (38.0, None, 790.0, "needs 39.7 GiB by estimate, and this GPU has 38.0"),
        (79.2, 100, 790.0, "takes about 130 s, and 100 s are left"),
        (79.2, 200, 790.0, None),
        (79.2, 200, 395.0, "takes about 260 s, and 200 s are left"),
    ],
)
def test_what_does_not_fit_is_not_begun(proof, memory, seconds, rate, said):
    machine = {**MACHINE, "gib": memory, "matmul_tflops": rate}
    assert proof.reason_to_skip(proof.STAGES["512-bf16"], machine, seconds, rehearse=False) == said


def test_recorded_results_can_be_told(proof):
    for line in lines(ROOT / "benchmarks" / "results" / "gpu_proof.jsonl"):
        told = proof.STAGES[line["stage"]].told(line["result"])
        assert re.search(r"\d", told)


@pytest.mark.slow
def test_rehearsal(proof, tmp_path):
    file = tmp_path / "proof.jsonl"
    assert proof.main(["--rehearse", "--results", str(file)]) == 0
    assert [(line["stage"], line["status"]) for line in lines(file)] == [(name, "passed") for name in proof.STAGES]
