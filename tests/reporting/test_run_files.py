"""A run's files are read back, whatever happened to the run in between."""

import json
import math

import numpy as np
import pytest
import torch

from tests.helpers.run_folders import generation, write_run
from trl_unigrpo.monitoring.alarm import Alarm, append_alarm
from trl_unigrpo.reporting.gallery import choose, dataset_name
from trl_unigrpo.reporting.run_files import (
    GivenAlarm,
    NoRunError,
    Records,
    json_value,
    newest_state,
    read_run,
)


def rewards(run):
    return [(row["step"], row["reward"]) for row in run.metrics]


def log(records, *steps, value=0.0):
    for step in steps:
        records.add("metrics", step, values={"reward": value})


def test_a_generation_comes_back_as_it_was(tmp_path):
    texts = {"answers": ["yes", None, {"a": math.nan}, "\ud83d"]}
    shown, images = choose(generation(["a \x00 cat"], extra=texts, rewards=[0.5, math.nan, 1.0, 0.0]), 7)
    Records(tmp_path, "a").show(shown, images)
    (found,) = read_run(tmp_path).shown
    assert (found.step, found.mode, found.group_size, found.total, found.side) == (7, "train", 4, 4, 64)
    assert [sample.prompt for sample in found.samples] == ["a \x00 cat"] * 4
    assert [sample.reward for sample in found.samples] == [0.5, None, 1.0, 0.0]
    assert [sample.rewards["judge"] for sample in found.samples] == [0.5, None, 1.0, 0.0]
    assert [sample.extra["answers"] for sample in found.samples] == ["yes", None, {"a": None}, "\ud83d"]
    assert [sample.index for sample in found.groups[0]] == [2, 0, 3, 1]  # the best first, the failed one last
    for sample in found.samples:
        assert (tmp_path / "gallery" / sample.image).read_bytes() == images[sample.image]


def test_few_images_of_a_large_batch_in_whole_groups():
    for groups, size, kept in ((32, 24, 48), (12, 16, 48), (1, 100, 100), (3, 40, 40), (2, 4, 8)):
        shown, images = choose(generation([f"p{i}" for i in range(groups)], size, side=8), 0)
        assert len(shown.samples) == len(images) == kept
        assert shown.total == groups * size


def test_of_an_evaluation_all_numbers_are_kept_and_the_first_prompts_images():
    shown, images = choose(generation([f"p{i}" for i in range(40)], 2, "eval", side=8), 0)
    assert len(shown.samples) == 80 and len(images) == 16
    assert [sample.index for sample in shown.samples if sample.image] == list(range(0, 32, 2))


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    records = Records(tmp_path, "first")
    records.add("start", 0)
    log(records, 1, 2, 3, 4)
    for step in (0, 3):
        records.show(*choose(generation(["old"], seed=step), step))
    again = Records(tmp_path, "second")
    again.add("start", 2)
    log(again, 3, value=1.0)
    again.show(*choose(generation(["new"]), 2))
    run = read_run(tmp_path)
    assert rewards(run) == [(1, 0.0), (2, 0.0), (3, 1.0)]
    assert [(shown.step, shown.samples[0].prompt) for shown in run.shown] == [(0, "old"), (2, "new")]
    assert not run.finished
    again.add("end", 3)
    assert read_run(tmp_path).finished


def test_a_new_run_in_the_same_folder_forgets_the_old_one(tmp_path):
    old = Records(tmp_path, "old")
    old.add("start", 0)
    log(old, 0, 1, value=9.0)
    old.add("end", 1)
    new = Records(tmp_path, "new")
    log(new, 0, value=0.5)  # an evaluation before training
    new.add("start", 0)
    log(new, 1)
    run = read_run(tmp_path)
    assert rewards(run) == [(0, 0.5), (1, 0.0)] and not run.finished


def test_a_line_that_a_crash_cut_off_is_lost_alone(tmp_path):
    records = Records(tmp_path, "a")
    log(records, 1, 2)
    file = tmp_path / "gallery" / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    run = read_run(tmp_path)
    assert rewards(run) == [(1, 0.0)] and run.problems == []  # it may be being written
    log(Records(tmp_path, "b"), 2, value=1.0)
    run = read_run(tmp_path)
    assert rewards(run) == [(1, 0.0), (2, 1.0)]
    assert len(run.problems) == 1 and "records.jsonl, line 2" in run.problems[0]


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path):
    write_run(tmp_path, steps=(0, 2))
    file = tmp_path / "gallery" / "records.jsonl"
    lines = file.read_text().splitlines()
    broken = json.loads(lines[1])
    del broken["samples"][0]["prompt"]
    lines[1:2] = [json.dumps(broken), "[1, 2]", '{"kind": "metrics"}', "\x00\x00"]
    file.write_text("\n".join(lines) + "\n")
    append_alarm(tmp_path, 3, "train", Alarm("n", "m", {"x": 1}, (1, 2)), stopped=False)
    with (tmp_path / "alarms.jsonl").open("a") as alarms:
        alarms.write('{"step": "?"}\n')
    append_alarm(tmp_path, 4, "eval", Alarm("o", "m"), stopped=True)
    (tmp_path / "gallery" / "run.json").write_text("{")
    run = read_run(tmp_path)
    assert [problem.split(":")[0] for problem in run.problems] == [
        "records.jsonl, line 3",
        "records.jsonl, line 4",
        "records.jsonl, line 5",
        "records.jsonl, line 2",
        "gallery/run.json",
        "alarms.jsonl, line 2",
    ]
    assert len(run.shown) == 3 and len(run.metrics) == 2 and run.info == {}
    assert run.alarms == [GivenAlarm(3, "n", "m", [1, 2], "train", False), GivenAlarm(4, "o", "m", [], "eval", True)]


def state(step, max_steps=100, **changes):
    history = [{"step": i, "reward": float(i)} for i in range(1, step + 1)]
    return json.dumps({"log_history": history, "max_steps": max_steps, "global_step": step, **changes})


def test_without_a_gallery_the_newest_checkpoint_tells_the_curves(tmp_path):
    for step in (8, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state(step))
    (tmp_path / "checkpoint-last").mkdir()
    run = read_run(tmp_path)
    assert rewards(run)[-1] == (100, 100.0) and run.finished and run.alarms == []
    (tmp_path / "trainer_state.json").write_text(state(5))
    assert newest_state(tmp_path) == tmp_path / "trainer_state.json"
    assert not read_run(tmp_path).finished


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "holds no run: expected gallery/records.jsonl, or trainer_state.json"),
        (lambda folder: (folder / "trainer_state.json").write_text("{"), "trainer_state.json can't be read"),
        (lambda folder: (folder / "trainer_state.json").write_text("[]"), "can't be read"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"log_history": 3}'), "can't be read"),
        (lambda folder: folder.rmdir(), "is not a folder: expected the output_dir"),
    ],
)
def test_folders_without_a_run(tmp_path, make, message):
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    with pytest.raises(NoRunError, match=message):
        read_run(folder)


def test_values_become_json():
    value = {"a": np.float32(0.5), 1: (torch.tensor(2.0), math.inf), "b": True, "c": object, "d": None}
    assert json_value(value) == {"a": 0.5, "1": [2.0, None], "b": True, "c": "<class 'object'>", "d": None}


@pytest.mark.parametrize(
    "metrics, name",
    [({"eval_runtime": 1, "eval_reward": 2}, ""), ({"eval_hard_runtime": 1}, "hard"), ({"test_runtime": 1}, "test")],
)
def test_datasets_of_evaluations_are_told_apart(metrics, name):
    assert dataset_name(metrics) == name
