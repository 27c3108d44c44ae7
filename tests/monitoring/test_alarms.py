"""Alarms in runs that are spoiled as public ones were: each fault is made, none of the thresholds is fed."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trl_unigrpo.trainers.unigrpo_trainer as module
from tests.helpers.runs import DIVERGING, alarms_of, given, run, shapeworld_trainer
from tests.helpers.tiny_unified import FixedTexts, prompts_dataset, redness, weights
from trl_unigrpo.monitoring import alarms
from trl_unigrpo.monitoring.alarm import read_alarms
from trl_unigrpo.monitoring.trust import TrustError
from trl_unigrpo.shapeworld import shapeworld_reward
from trl_unigrpo.trainers import windows


# Updates


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.0], ids=["clipped", "not-clipped"])
def test_divergence_is_stopped_saved_and_explained(make_trainer, tmp_path, caplog, max_grad_norm):
    trainer = make_trainer(**{**DIVERGING, "max_grad_norm": max_grad_norm})
    trainer.train()
    assert trainer.state.global_step <= 10
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "model.safetensors").is_file()
    assert all(weight.isfinite().all() for weight in weights(trainer.model).values())
    (line,) = read_alarms(tmp_path)
    assert line["alarm"] == "update/grad_norm/image" and line["stopped"]
    assert "lower learning rate" in caplog.text and "A checkpoint is saved" in caplog.text


def test_the_same_run_at_a_sound_rate_goes_on(make_trainer, tmp_path):
    trainer = make_trainer(**{**DIVERGING, "image_learning_rate": 5e-4})
    trainer.train()
    assert trainer.state.global_step == 25
    assert read_alarms(tmp_path) == []


def test_divergence_goes_on_where_told_to_and_nothing_watches_where_told_to(make_trainer, tmp_path):
    settings = {**DIVERGING, "max_steps": 9, "save_strategy": "no"}
    trainer = make_trainer(**settings, alarms="warn")
    trainer.train()
    assert trainer.state.global_step == 9
    assert [line["stopped"] for line in read_alarms(tmp_path)] == [False]
    off = make_trainer(output_dir=tmp_path / "off", **settings, alarms="off")
    off.train()
    assert off.state.global_step == 9
    assert read_alarms(tmp_path / "off") == []
    assert "images/noise" not in off.state.log_history[0]


@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_gradient_that_is_not_finite_does_not_reach_the_weights(make_trainer, train, tmp_path, what):
    settings = {"max_steps": 6, "optim": "adamw_torch", "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 9}
    trainer = make_trainer(**settings)
    compute_loss = trainer._compute_loss

    def spoiled(model, inputs):
        return compute_loss(model, inputs) * (what if trainer.state.global_step == 3 else 1)

    trainer._compute_loss = spoiled
    seen = train(trainer)
    assert trainer.state.global_step == 4
    after = weights(trainer.model)
    for name, value in seen.weights[3].items():  # those before the fourth step, after the third
        assert torch.equal(value, after[name]), name
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for name, value in saved.items():
        if name in after:
            assert torch.equal(value, after[name])
    assert given(tmp_path)["update/not_finite"]["stopped"]


# The run's memory


def test_what_alarms_know_survives_a_resume(make_trainer, tmp_path):
    def by_place(images, **_):
        return [float(i % 4) if i % 4 else None for i in range(len(images))]

    settings = {"reward_funcs": by_place, "eval_dataset": prompts_dataset(copies=2), "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "num_generations_eval": 1, "per_device_eval_batch_size": 8}
    whole = run(make_trainer, tmp_path / "whole", **settings)
    resumed = run(make_trainer, tmp_path / "whole", tmp_path / "whole" / "checkpoint-3", **settings)
    assert alarms_of(whole).state() == alarms_of(resumed).state()
    json.dumps(alarms_of(whole).state())
    assert len(alarms_of(whole)._rewards.failures) == 3  # of three generations, one of them after the resume
    lines = read_alarms(tmp_path / "whole")
    assert [line["alarm"] for line in lines].count("reward/failures") == 1  # step 4 was made twice


def test_checkpoint_of_a_run_without_alarms_goes_on_with_them(make_trainer, tmp_path):
    run(make_trainer, tmp_path / "whole", max_steps=2, alarms="off")
    resumed = run(make_trainer, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2")
    assert resumed.state.global_step == 6
    assert (tmp_path / "resumed" / "checkpoint-6").is_dir()


def test_a_second_run_of_a_trainer_starts_anew(make_trainer):
    trainer = make_trainer(max_steps=4)
    for _ in range(2):
        trainer.train()
        assert alarms_of(trainer)._rewards.generations == 2


# Rewards


def test_reward_that_keeps_failing_names_the_samples_it_left_out(make_trainer, tmp_path, caplog):
    def timing_out(images, **_):
        scores = []
        for i in range(len(images)):
            try:
                if i in (1, 6):
                    raise TimeoutError("the judge did not answer")
                scores.append(float(i))
            except TimeoutError:
                scores.append(None)
        return scores

    make_trainer(reward_funcs=timing_out, max_steps=8).train()
    (line,) = read_alarms(tmp_path)  # once, though it goes on
    assert (line["alarm"], line["step"], line["indices"]) == ("reward/failures", 4, [1, 6])
    assert "25% of the samples have no score" in caplog.text


def test_reward_that_fails_once_is_forgiven(make_trainer, tmp_path):
    calls = []

    def hiccup(images, **_):
        calls.append(1)
        return [None if len(calls) == 2 else float(i) for i in range(len(images))]

    make_trainer(reward_funcs=hiccup, max_steps=8).train()
    assert read_alarms(tmp_path) == []


def test_rewards_that_say_nothing_are_said_again_after_a_while(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(alarms, "COOL_DOWN", 9)

    def rounding(images, **_):
        return [20.1 + 4e-6 * (i % 2) for i in range(len(images))]

    make_trainer(reward_funcs=rounding, max_steps=20, thinking=False, text_weight=0.0).train()
    steps = [line["step"] for line in read_alarms(tmp_path) if line["alarm"] == "reward/zero_variance"]
    assert steps == [8, 18]  # generations are made at every second step


def test_group_with_a_single_score_trains_nothing_and_says_so(make_trainer, train, tmp_path):
    # UniRL#326: the standard deviation of one number is NaN.
    seen = train(
        make_trainer(reward_funcs=lambda images, **_: [None if i % 4 else 1.0 + i for i in range(8)], max_steps=10)
    )
    assert all((batch["advantages"] == 0).all() for batch in seen.batches)
    assert {"reward/failures", "reward/zero_variance"} <= set(given(tmp_path))


# Sampling, later than the start-up checks


def later(function, broken, trainer):
    """`function`, and `broken` from the second generation on."""
    return lambda *args, **kwargs: (broken if trainer.generation else function)(*args, **kwargs)


def test_noise_that_begins_to_repeat_is_found_though_thinkings_differ(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=4, trainer_class=FixedTexts)
    seeded = module.row_generator
    broken = later(seeded, lambda *key: seeded(*key[:-1]), trainer)  # the row is left out of the key
    monkeypatch.setattr(module, "row_generator", broken)
    with pytest.raises(TrustError, match="share their noise"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_window_that_begins_to_differ_between_samples_is_found(make_trainer, monkeypatch):
    # verl-omni's windows were drawn per request: reward .78 -> .62 within 28 steps.
    trainer = make_trainer(max_steps=4)
    many = lambda *_: torch.stack([torch.arange(3) + i % 2 for i in range(8)])  # noqa: E731
    monkeypatch.setattr(module, "draw_windows", later(module.draw_windows, many, trainer))
    with pytest.raises(TrustError, match="different SDE windows"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_schedule_of_another_number_of_steps_is_found(make_trainer):
    # verl-omni#279: the sampler made one step fewer than the update thought.
    window = {"sde_window_mode": "fixed", "sde_window_range": [0, 2], "sde_window_size": 1}
    trainer = make_trainer(num_inference_steps=3, image_size=16, **window)
    trainer._setup.objective.first_nodes = [windows.flow_timesteps(2, trainer.args.timestep_shift)[1]]
    with pytest.raises(TrustError, match="times the power.*num_inference_steps"):
        trainer.train()


def test_sampler_of_another_noise_level_is_found(make_trainer, monkeypatch):
    plan = windows.RolloutPlan
    monkeypatch.setattr(windows, "RolloutPlan", lambda **given: plan(**{**given, "noise_level": 0.5}))
    with pytest.raises(TrustError, match="times the power.*noise_level"):
        make_trainer().train()


def test_sampler_of_another_temperature_is_found(make_trainer):
    trainer = make_trainer()
    trainer.generation_config.temperature = 0.7
    with pytest.raises(TrustError, match="sampled at temperature 0.7, but trained on at temperature 1.0"):
        trainer.train()


# Thinkings, really trained towards each fault

WORDS = {
    "flow_weight": 0.0,
    "learning_rate": 1e-2,
    "max_grad_norm": 1e9,
    "num_inference_steps": 1,
    "per_device_train_batch_size": 16,  # 8 groups: the first generation is the baseline
    "num_iterations": 1,
}


def brevity(completions, **_):
    return [-float(len(text.split())) for text in completions]


def length(completions, **_):
    return [float(len(text.split())) for text in completions]


def stutter(completions, **_):
    texts = [text.split() for text in completions]
    return [float(sum(a == b for a, b in pairwise(words))) for words in texts]


@pytest.mark.parametrize(
    ("reward", "limit", "alarm"),
    [
        (brevity, 24, "thinking/length"),
        (length, 16, "thinking/limit"),
        (stutter, 16, "thinking/repetition"),
    ],
)
def test_thinking_that_a_reward_spoils(make_trainer, tmp_path, reward, limit, alarm):
    dataset = prompts_dataset(copies=4)
    make_trainer(reward_funcs=reward, train_dataset=dataset, max_completion_length=limit, max_steps=8, **WORDS).train()
    line = given(tmp_path)[alarm]
    before, now = line["values"]["before"], line["values"]["now"]
    assert now < 0.5 * before if alarm == "thinking/length" else now > before + 0.2
    assert line["indices"]


# Images of a model that paints


def brightness(images, **_):
    return [float(np.asarray(image.convert("L")).mean()) / 255 for image in images]


@pytest.mark.slow
def test_images_that_please_a_foolish_reward_are_seen(tmp_path):
    # As UniRL#407, the other way round: the reward pays for light, and ShapeWorld's own reward is only watched.
    trainer = shapeworld_trainer(
        tmp_path,
        [brightness, shapeworld_reward],
        18,
        reward_weights=[1.0, 0.0],
        image_learning_rate=2e-3,
        flow_regularizer="none",
        flow_epsilon=1e-4,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert log[-1]["reward"] > 2 * log[0]["reward"]  # it was learned
    lines = given(tmp_path)
    assert {"images/noise", "images/bright_share", "reward/held_out"} <= set(lines)
    assert lines["images/noise"]["step"] <= 10
    assert lines["images/bright_share"]["step"] <= 20
    held_out = lines["reward/held_out"]["values"]
    assert held_out["shapeworld_reward in training, now"] < held_out["shapeworld_reward in training, before"]
    assert all(line["indices"] and max(line["indices"]) < 64 for line in lines.values())
    assert not any(line["stopped"] for line in lines.values())


def test_images_of_repeated_noise_are_twins(tmp_path, monkeypatch):
    # Without the start-up checks, from the second generation on.
    trainer = shapeworld_trainer(tmp_path, shapeworld_reward, 4, trust_checks="off")
    seeded = module.row_generator
    monkeypatch.setattr(module, "row_generator", later(seeded, lambda *key: seeded(*key[:-1]), trainer))
    trainer.train()
    line = given(tmp_path)["images/twins"]
    assert line["step"] == 2
    assert line["values"]["now"] == 1.0
    assert trainer.state.log_history[0]["images/twins"] < 0.2


def test_a_sound_run_gives_no_alarm(make_trainer, tmp_path):
    make_trainer(max_steps=12, reward_funcs=redness).train()
    assert read_alarms(tmp_path) == []
