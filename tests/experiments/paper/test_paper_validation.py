"""Early stopping: by the learned reward and nothing else, without a trace in the training."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.experiments.paper.test_paper_run import CHOICE
from trl_unigrpo.experiments.paper.jobs import Job
from trl_unigrpo.experiments.paper.run import run_job
from trl_unigrpo.experiments.paper.systems import SYSTEMS, Scale
from trl_unigrpo.experiments.paper.training import make_trainer, run_settings
from trl_unigrpo.experiments.paper.validation import Validation, undisturbed, validation_steps
from trl_unigrpo.shapeworld import evaluate_model, load_base


LEARNED = [0.3, 0.5, 0.7, 0.7, 0.4]
RULE = [0.9, 0.6, 0.5, 0.8, 0.95]
"""By the rule the last point is the best, by the learned reward the third, of two that are equal."""


def trained(tmp_path, restores):
    """A model whose one weight says at which point it is, taken through all of them; the callback's file as lines."""
    model = nn.Linear(1, 1, bias=False)

    def score():
        point = round(model.weight.item())
        return {"learned": LEARNED[point], "rule": RULE[point], "image_error": 0.01 * point}

    callback = Validation(tmp_path / "validation.jsonl", model, score, [0, 2, 4, 6, 8], 96.0, restores)
    nn.init.zeros_(model.weight)
    callback.on_train_begin(None, None, None)
    for step in range(1, 9):
        with torch.no_grad():
            model.weight += 0.5
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
    callback.on_train_end(None, None, None)
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    return model, callback, lines


def test_the_best_point_by_the_learned_reward_comes_back(tmp_path):
    model, callback, lines = trained(tmp_path, restores=True)
    assert model.weight.item() == 2
    assert callback.chosen == lines[2] == {"rollouts": 384, "learned": 0.7, "rule": 0.5, "image_error": 0.02}
    assert [line["rollouts"] for line in lines] == [0, 192, 384, 576, 768]
    assert [line["learned"] for line in lines] == LEARNED and [line["rule"] for line in lines] == RULE


def test_without_early_stopping_the_end_stays(tmp_path):
    model, callback, lines = trained(tmp_path, restores=False)
    assert model.weight.item() == 4 and callback.chosen == lines[-1] and len(lines) == 5


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ((140, 70, 7), [0, 20, 40, 60, 80, 100, 120, 140]),  # every ten rollouts, of two passes each
        ((420, 210, 21), list(range(0, 421, 20))),
        ((4, 2, 7), [0, 2, 4]),
        ((10, 10, 7), [0, 1, 3, 4, 6, 7, 9, 10]),
    ],
)
def test_points_are_even_and_after_whole_rollouts(arguments, steps):
    assert validation_steps(*arguments) == steps


def test_nothing_of_the_validation_is_left_in_the_training():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model.train()
    model[1].eval()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with undisturbed(model):
        model.eval()
        torch.rand(7)
    assert torch.equal(torch.rand(4), expected)
    assert model.training and model[0].training and not model[1].training


def painted(model, tokenizer):
    return {"learned": float(evaluate_model(model, tokenizer, 7, "validation").reward.mean())}


def test_a_run_trains_the_same_with_and_without_it(tmp_path):
    """Weights equal to the bit, and the same numbers logged, but for the seconds."""
    system, weights, logged = SYSTEMS["unigrpo"], [], []
    settings = run_settings(SYSTEMS["unigrpo"], CHOICE, Scale(2, 7)) | {"num_generations": 4}
    settings |= {"per_device_train_batch_size": 16}
    for validated in (False, True):
        torch.manual_seed(0)
        model, tokenizer = load_base()
        score = partial(painted, model, tokenizer)
        validation = Validation(tmp_path / "v.jsonl", model, score, [0, 2, 4], 8.0, False) if validated else None
        trainer = make_trainer(system, settings, 1, model, tokenizer, tmp_path, validation)
        trainer.train()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
        logged.append([{**row, "cpu_seconds": 0} for row in rows])
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 3
    assert logged[0] == logged[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "refl_thinking", "text_grpo"])
def test_a_run_is_scored_at_its_chosen_point(tmp_path, name):
    """With a rate that ruins the model, the start is the best point: the run is scored as the base is."""
    scale, choice = Scale(2, 7), {**CHOICE, name: {"learning_rate": 0.3}}
    result = run_job(Job(name, 0), tmp_path, scale, run_settings(SYSTEMS[name], choice, scale))
    lines = (tmp_path / name / "seed-0" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["rollouts"] for line in lines] == [0, 192, 384]
    assert result["chosen_point"] == json.loads(lines[0])
    base = run_job(Job("base", 0), tmp_path, scale, {})
    assert result["evaluations"]["sampled"] == base["evaluations"]["sampled"]


@pytest.mark.slow
def test_a_long_run_is_three_times_as_long_and_scored_at_its_end(tmp_path):
    scale, choice = Scale(1, 7), {"unigrpo": {"learning_rate": 0.3, "image_learning_rate": 0.3}}
    result = run_job(Job("long_none", 0), tmp_path, scale, run_settings(SYSTEMS["long_none"], choice, scale))
    lines = (tmp_path / "long_none" / "seed-0" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["rollouts"] for line in lines] == [0, 192, 384, 576]
    assert result["rollouts"] == 576 and result["chosen_point"] == json.loads(lines[-1])
    assert json.loads(lines[0])["learned"] > result["chosen_point"]["learned"], "the rate did ruin it"
