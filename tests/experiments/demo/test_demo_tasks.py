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
from trl_unigrpo.experiments.demo.edit import EditTask
from trl_unigrpo.experiments.demo.refine import Refined, RefineTask
from trl_unigrpo.shapeworld.edits import EditScores
from trl_unigrpo.shapeworld.evaluate import Evaluation
from trl_unigrpo.shapeworld.second_look import Edited, SecondLook
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
            "picture_error": 0.25,
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
    return Edited(
        ["make it red", "make it blue"], ["make"] * n, [RED] * n, [BLUE] * n, ["<said>"] * n, scores, np.zeros(n)
    )


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
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == ([0.5, 1.0, 0.25, 0.5] if task.main == "second" else [1, 1])
    assert f"{summary['change']['mean']:.3f}" in task.headline(summary)


def test_tasks_by_name(tmp_path):
    literal, _ = get_args(DemoOptions.__annotations__["task"])
    assert get_args(literal) == tuple(DEMOS)
    with pytest.raises(ValueError, match="task='draw': expected one of 'paint', 'refine', 'edit'"):
        run_demo(tmp_path, task="draw")
