"""The numbers and pages of the demo's tasks, on models measured by hand."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from trl_unigrpo.cli.demo import DemoOptions
from trl_unigrpo.experiments.demo import run_demo
from trl_unigrpo.experiments.demo.demo import DEMOS
from trl_unigrpo.experiments.demo.edit import Editing, EditTask
from trl_unigrpo.experiments.demo.refine import Refined, RefineTask
from trl_unigrpo.reporting.description import ROUND_SETTINGS, shown_settings
from trl_unigrpo.shapeworld.base import load_base
from trl_unigrpo.shapeworld.edits import EditScores
from trl_unigrpo.shapeworld.evaluate import EVALUATION_SEED, Evaluation, evaluate_model
from trl_unigrpo.shapeworld.second_look import Edited, SecondLook, StoryScores
from trl_unigrpo.shapeworld.settings import edit_settings, refine_settings
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig


RED, BLUE = (Image.new("RGB", (48, 48), color) for color in ("red", "blue"))


def refined(first, second, another, kept):
    """Measure four prompts, of which the third has the first's text."""
    n, first, second = len(first), np.array(first), np.array(second)
    prompts = ["a", "b", "a", "c"][:n]
    evaluation = Evaluation(
        prompts=prompts,
        categories=["counting"] * n,
        thinking=["a plan"] * n,
        images=[RED] * n,
        reward=first,
        strict=np.floor(first),
        plan=first,
        error=np.full(n, 0.25),
        latents=torch.zeros(n, 9, 8),
    )
    look = SecondLook(
        said=["<look>"] * n,
        images=[RED if keep else BLUE for keep in kept],
        first=first,
        reward=second,
        first_strict=np.floor(first),
        strict=np.floor(second),
        diagnosis=np.full(n, 0.5),
        kept=np.array(kept, dtype=float),
        harmed=np.full(n, np.nan),
    )
    return Refined(evaluation, look, np.array(another))


BEFORE = refined([0.5, 1.0, 0.25, 1.0], [0.5, 0.5, 0.25, 1.0], [0.75, 1.0, 0.0, 0.5], [1, 0, 0, 1])
AFTER = refined([0.5, 1.0, 0.25, 0.5], [1.0, 1.0, 0.75, 0.25], [0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1])


def means(summary, when):
    return {key.removesuffix(f"_{when}"): value["mean"] for key, value in summary.items() if key.endswith(when)}


def test_numbers_of_a_second_round():
    summary = RefineTask().summary(BEFORE, AFTER)
    assert means(summary, "before") == pytest.approx(
        {
            "first": 0.6875,
            "second": 0.5625,
            "round_gain": -0.125,
            "best_of_two": 0.75,
            "above_best_of_two": -0.1875,
            "damage": 0.25,
            "diagnosis": 0.5,
            "image_error": 0.25,
        }
    )  # the faults that were kept are one prompt's, so that there is no interval
    after = means(summary, "after")
    assert (after["damage"], after["round_gain"]) == (0.25, pytest.approx(0.1875))
    assert summary["change"]["mean"] == pytest.approx(0.1875) and summary["change"]["n"] == 3  # prompts
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_what_has_no_value_is_left_out():
    right = refined([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1, 0])
    rows = [row.key for row, *_ in RefineTask().numbers(right, right)]
    assert "true_stop" in rows and "false_stop" not in rows


def edited(done, kept):
    scores = EditScores(np.array(done), np.array(kept))
    n = len(done)
    told = ["make it red", "make it blue"]
    edits = Edited(told, ["make"] * n, [RED] * n, [BLUE] * n, ["<said>"] * n, scores, np.zeros(n))
    turns = [["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"]]
    half = EditScores(np.full(3, 0.5), np.full(3, 0.5))
    return Editing(edits, StoryScores(turns, half, np.array([1.0, 0.5, 0.75])))


def test_numbers_of_edits_and_of_stories_which_are_other_rows():
    summary = EditTask().summary(edited([0.25, 0], [1, 1]), edited([1, 0.25], [1, 1]))
    expected = {"reward": 0.25, "done": 0.125, "kept": 1.0, "image_error": 0.0, "story": 0.5, "untouched": 0.75}
    assert means(summary, "before") == pytest.approx(expected)
    assert summary["untouched_before"]["n"] == 3 and summary["reward_before"]["n"] == 2
    assert summary["change"]["mean"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("task", "before", "after", "says"),
    [
        (RefineTask(), BEFORE, AFTER, ["the reward of the last image moved by +0.188", "&lt;look&gt;", "kept"]),
        (EditTask(), edited([0.25, 0], [1, 1]), edited([1, 1], [1, 1]), ["the reward of an edit moved by +0.750"]),
    ],
)
def test_page_and_files_of_a_task(tmp_path, task, before, after, says):
    summary = task.summary(before, after) | {"steps": 1, "train_seconds": 1.0, "threads": 1, "seed": 0, "versions": {}}
    args = UniGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    task.write_report(tmp_path / "report.html", before, after, [{"reward": 0.5}], summary, args)
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert all(word in page for word in says)
    assert 'src="http' not in page
    task.save(after, tmp_path / "samples.jsonl")
    assert "num_rounds" not in page  # one, by these arguments
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == ([0.5, 1.0, 0.25, 0.5] if task.main == "second" else [1, 1])
    assert f"{summary['change']['mean']:.3f}" in task.headline(summary)


def test_settings_of_refine_and_edit_are_those_that_were_measured():
    settings = refine_settings(3)
    chosen = {"max_steps": 6, "num_rounds": 2, "round_group": "tree", "round_select": "random", "keep_perfect": 0.2}
    chosen |= {"noise_level": [0.7, 0.15], "image_learning_rate": 5e-5, "max_reflection_length": 32}
    assert {name: settings[name] for name in chosen} == chosen
    chosen = {"max_steps": 6, "image_learning_rate": 5e-5, "max_completion_length": 32, "system_prompt": ""}
    assert {name: edit_settings(3)[name] for name in chosen} == chosen
    assert (RefineTask.rollouts, EditTask.rollouts) == (40, 45)  # docs/shapeworld.md has what comes of them


def test_a_page_s_settings_have_those_of_rounds_where_there_are_several(tmp_path):
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    one, two = (shown_settings(UniGRPOConfig(**plain, num_rounds=number)) for number in (1, 2))
    assert set(two) - set(one) == set(ROUND_SETTINGS) and two["num_rounds"] == 2


def test_a_page_s_settings_have_averages_where_they_are_on(tmp_path):
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    off, on = shown_settings(UniGRPOConfig(**plain)), shown_settings(UniGRPOConfig(**plain, ema_decay=0.9))
    assert set(on) - set(off) == {"ema_decay"} and on["ema_decay"] == 0.9


def test_another_noise_of_the_same_prompts():
    model, tokenizer = load_base(seeing=True)
    first, same = (evaluate_model(model, tokenizer, 7, noise_seed=seed) for seed in (None, EVALUATION_SEED))
    other = evaluate_model(model, tokenizer, 7, noise_seed=EVALUATION_SEED + 2)
    assert first.prompts == other.prompts
    assert torch.equal(first.latents, same.latents) and not (first.latents == other.latents).all((1, 2)).any()


def test_tasks_by_name(tmp_path):
    literal, _ = get_args(DemoOptions.__annotations__["task"])
    assert get_args(literal) == tuple(DEMOS)
    with pytest.raises(ValueError, match="task='draw': expected one of 'paint', 'refine', 'edit'"):
        run_demo(tmp_path, task="draw")
