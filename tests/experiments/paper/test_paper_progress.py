"""Shown while runs are done: bars and lines."""

import io
import json

import pytest
from rich.console import Console

from trl_unigrpo.experiments.paper.jobs import Job
from trl_unigrpo.experiments.paper.progress import Display, duration, last_row


JOB = Job("unigrpo", 2)


@pytest.fixture
def folder(tmp_path):
    folder = JOB.folder(tmp_path)
    folder.mkdir(parents=True)
    return folder


def display(output, **console):
    out = io.StringIO()
    return out, Display(Console(file=out, width=120, **console), output, total=3, rollouts=26_880)


def test_lines_where_there_is_no_terminal(folder, tmp_path):
    evaluations = {
        "sampled": {"learned": [0.5, 1.0], "rule": [0.2, 0.4]},
        "greedy": {"learned": [1, 1], "rule": [1, 1]},
    }
    (folder / "run.json").write_text(json.dumps({"evaluations": evaluations, "seconds": 291.4}))
    out, shown = display(tmp_path, force_terminal=False)
    with shown:
        shown.started(JOB)
        shown.tick([JOB])
        shown.finished(JOB)
        shown.failed(Job("sft", 0), "exit code 1\nValueError: [bold] is no colour")
    assert out.getvalue().strip().splitlines() == [
        "unigrpo seed 2: sampled 0.750 (rule 0.300), greedy 1.000 (rule 1.000), 291 s (1 of 3)",
        "sft seed 0 failed (2 of 3): exit code 1",
        "ValueError: [bold] is no colour",
    ]


def test_bars_on_a_terminal(folder, tmp_path):
    (folder / "history.jsonl").write_text(json.dumps({"rollouts": 1920, "reward": 0.7341}) + "\n")
    out, shown = display(tmp_path, force_terminal=True, force_interactive=True)
    with shown:
        shown.started(JOB)
        shown.tick([JOB])
        shown.progress.refresh()
    text = out.getvalue()
    assert "unigrpo seed 2" in text and "1920/26880" in text and "reward 0.734" in text and "0/3" in text


def test_a_half_written_line_is_left_for_later(folder):
    file = folder / "history.jsonl"
    assert last_row(file) == {}
    file.write_text('{"reward": 0.1}\n{"reward": 0.2}\n{"rew')
    assert last_row(file) == {"reward": 0.2}
    file.write_text('{"rew')
    assert last_row(file) == {}


@pytest.mark.parametrize("seconds, text", [(10, "1 min"), (2400, "40 min"), (7500, "2 h 5 min"), (3570, "1 h 0 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text
