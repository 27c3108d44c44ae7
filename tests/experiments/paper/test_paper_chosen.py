"""The search's choice: by validation reward, with what is doubtful about it."""

import json

import numpy as np
import pytest

from trl_unigrpo.experiments.paper.chosen import (
    choose_candidate,
    choose_from_folders,
    load_chosen,
    read_entries,
    write_entries,
)
from trl_unigrpo.experiments.paper.jobs import search_jobs
from trl_unigrpo.experiments.paper.runner import choice_line
from trl_unigrpo.experiments.paper.systems import RATES, SYSTEMS


PROMPTS = [f"prompt {index}" for index in range(200)]


def rewards(*means, spread=0.0):
    """Each candidate's rewards: a difficulty that all share, its own mean, and noise of its own."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.1, len(PROMPTS))
    return [(mean + shared + rng.normal(0, spread, len(PROMPTS))).tolist() for mean in means]


def test_the_best_mean_wins():
    found = rewards(0.5, 0.6, 0.7, 0.4, 0.3)
    entry = choose_candidate(RATES, found, PROMPTS)
    assert entry["settings"] == RATES[2] and entry["at_edge"] == [] and entry["as_good"] == []
    assert [of["settings"] for of in entry["candidates"]] == list(RATES)
    for of, row in zip(entry["candidates"], found, strict=True):
        half = 1.959964 * np.std(row, ddof=1) / np.sqrt(len(row))
        assert of["reward"] == pytest.approx(np.mean(row), abs=1e-4)
        assert of["interval"] == pytest.approx([np.mean(row) - half, np.mean(row) + half], abs=1e-4)


def test_edges_and_ties_are_reported():
    tie = choose_candidate(RATES, rewards(0.6, 0.5, 0.6, 0.4, 0.3), PROMPTS)
    assert tie["settings"] == RATES[0] and tie["at_edge"] == ["learning_rate"] and tie["as_good"] == [2]
    line = choice_line(SYSTEMS["sft"], tie)
    assert "learning_rate 2.5e-05" in line and "edge" in line and "candidate 2" in line

    # Between two rows of spread .14 a difference has a standard error of .014: .01 is within it, .1 is not.
    noisy = choose_candidate(RATES, rewards(0.4, 0.5, 0.61, 0.6, 0.3, spread=0.14), PROMPTS)
    best = RATES.index(noisy["settings"])
    assert best in (2, 3) and noisy["as_good"] == [5 - best]

    joint = SYSTEMS["unigrpo"].candidates
    assert choose_candidate(joint, rewards(0.5, 0.6, 0.5, 0.7, 0.5), PROMPTS)["at_edge"] == ["learning_rate"]
    assert choose_candidate(joint, rewards(0.5, 0.8, 0.7, 0.5, 0.5), PROMPTS)["at_edge"] == []


def test_from_the_folders_to_the_file(tmp_path):
    """Choose by the learned reward in the system's own mode; the entries of other systems stay as they are."""
    system = SYSTEMS["flow_grpo_thinking"]
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "prompts.json").write_text(json.dumps({"prompts": PROMPTS}))
    for job, values in zip(search_jobs(system), rewards(0.5, 0.7, 0.6, 0.4, 0.3), strict=True):
        others = [1 - value for value in values]  # by the rule the worst is the best
        evaluations = {"greedy": {"learned": others}, "sampled": {"learned": values, "rule": others}}
        run = {"evaluations": evaluations, "split": "validation", "seed": job.seed, "rollouts": 9}
        job.folder(tmp_path).mkdir(parents=True)
        (job.folder(tmp_path) / "run.json").write_text(json.dumps(run))
    entry = choose_from_folders(system, tmp_path)
    assert entry["settings"] == system.candidates[1] and entry["mode"] == "sampled" and entry["num_prompts"] == 200

    file = tmp_path / "chosen.json"
    write_entries(file, {"unifpo": {"settings": {"learning_rate": 1e-4}}})
    write_entries(file, {**read_entries(file), "flow_grpo_thinking": entry})
    assert list(read_entries(file)) == ["flow_grpo_thinking", "unifpo"]  # the grid's order
    assert load_chosen(file) == {"flow_grpo_thinking": system.candidates[1], "unifpo": {"learning_rate": 1e-4}}
    before = file.read_bytes()
    write_entries(file, dict(reversed(read_entries(file).items())))
    assert file.read_bytes() == before


def test_no_file_is_no_choice_and_unknown_systems_are_named(tmp_path):
    assert read_entries(tmp_path / "chosen.json") == {}
    (tmp_path / "chosen.json").write_text('{"unigrop": {}}')
    with pytest.raises(ValueError, match="unigrop"):
        read_entries(tmp_path / "chosen.json")
