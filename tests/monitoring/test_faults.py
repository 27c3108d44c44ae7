"""Faults of public runs, made in whole runs of ours: each has to be found, or not to matter."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.runs import given, shapeworld_trainer
from tests.helpers.tiny_unified import broken, spy_paint
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.monitoring import reward_alarms
from trl_unigrpo.monitoring.trust import TrustError
from trl_unigrpo.shapeworld import shapeworld_reward


def test_update_without_the_guidance_of_the_rollout(make_trainer):
    # verl-omni#280.
    class Unguided(BagelForUnifiedGeneration):
        def guided(self, steps, velocity, *args, **kwargs):
            return velocity

    with pytest.raises(TrustError, match="velocities of the rollout and of the training forward differ"):
        make_trainer(model=broken(Unguided), guidance_scale=3.0).train()


def test_update_that_follows_a_schedule_of_its_own(make_trainer):
    # UniRL#326: the replay's schedule was not initialised, so that its times were not the sampler's.
    class Unshifted(BagelForUnifiedGeneration):
        def packed_forward(self, input_ids, attention_mask, steps, context_grad=False):
            t = steps.t / (3 - 2 * steps.t)  # the shift of 3 undone
            steps = replace(steps, states=replace(steps.states, t=t))
            return super().packed_forward(input_ids, attention_mask, steps, context_grad)

    with pytest.raises(TrustError, match="velocities of the rollout and of the training forward differ"):
        make_trainer(model=broken(Unshifted)).train()


def test_rollout_whose_trajectory_is_another_one(make_trainer, monkeypatch):
    # UniRL#397: an engine dropped the SDE's trajectory; what was recorded were steps of an ODE.
    def deterministic(images):
        for image in images:
            steps = image.steps
            steps.x_next = steps.x + (steps.t_next - steps.t)[:, None, None] * steps.velocity
        return images

    spy_paint(monkeypatch, change=deterministic)
    with pytest.raises(TrustError, match="times the power"):
        make_trainer().train()


def test_policy_that_a_learning_rate_destroys(tmp_path):
    # flow_grpo#182: the reward goes to 0, images become noise.
    trainer = shapeworld_trainer(tmp_path, shapeworld_reward, 4, image_learning_rate=0.1, num_iterations=1)
    trainer.train()
    fallen = given(tmp_path)["reward/fallen"]
    assert fallen["values"]["now"] < 0.5 * fallen["values"]["before"]
    assert fallen["indices"]


def test_reward_that_has_nothing_to_do_with_the_image(make_trainer, tmp_path, monkeypatch):
    # UniRL#121, DanceGRPO#45: groups of two, and a reward that stays where it was.
    monkeypatch.setattr(reward_alarms, "STALLED", 20)
    random = np.random.default_rng(0)

    def noise(images, **_):
        return random.normal(size=len(images)).tolist()

    settings = {"num_generations": 2, "thinking": False, "text_weight": 0.0, "num_iterations": 1, "max_steps": 21}
    make_trainer(reward_funcs=noise, **settings).train()
    assert given(tmp_path)["reward/stalled"]["step"] == 19
