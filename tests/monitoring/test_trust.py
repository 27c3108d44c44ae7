"""The start-up checks, each on a run that is broken on purpose."""

import warnings
from dataclasses import replace

import pytest
import torch

from tests.helpers.tiny_unified import broken, spy_paint
from trl_unigrpo import UniGRPOConfig
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.objectives import FlowGRPO
from trl_unigrpo.flow.sampler import RolloutPlan, draw_noise, sample_latents
from trl_unigrpo.flow.states import SDESteps
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.monitoring.events import ImageLoss, Rollout
from trl_unigrpo.monitoring.trust import TrustChecks, TrustError, velocity_problem
from trl_unigrpo.trajectory import Image, Round, Trajectory


def rounded_states(images):
    for image in images:
        image.steps.x_next = image.steps.x_next.bfloat16()
    return images


def rounded_values(images):
    for image in images:
        image.steps.x = image.steps.x.bfloat16().float()
        image.steps.x_next = image.steps.x_next.bfloat16().float()
        image.steps.velocity = image.steps.velocity.bfloat16().float()
    return images


def shared_noise(images):
    for image in images:
        image.steps = images[0].steps
    return images


def many_windows(images):
    images[-1].steps.t = images[-1].steps.t - 0.01
    return images


BROKEN = [
    (rounded_states, "states have the precision of torch.bfloat16, expected torch.float32"),
    (rounded_values, "states have the precision of torch.bfloat16, expected torch.float32"),
    (shared_noise, "share their noise"),
    (many_windows, "different SDE windows"),
]


class OtherTrainingForward(BagelForUnifiedGeneration):
    def packed_forward(self, input_ids, attention_mask, steps, context_grad=False):
        steps = replace(steps, states=replace(steps.states, t=steps.t - 0.1))
        return super().packed_forward(input_ids, attention_mask, steps, context_grad)


def test_training_forward_that_sees_something_else_stops_at_once(make_trainer):
    trainer = make_trainer(model=broken(OtherTrainingForward))
    message = "velocities of the rollout and of the training forward differ by .*check dropout"
    with pytest.raises(TrustError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.warns(UserWarning, match=message):
        make_trainer(model=broken(OtherTrainingForward), trust_checks="warn", max_steps=1).train()


@pytest.mark.parametrize(("differ", "stops"), [(1, False), (8, True)])
def test_one_step_that_differs_does_not_stop_a_run(differ, stops):
    """Eight steps at a limit of half of the clip range: one that takes all of it, then all of them."""
    args = UniGRPOConfig(output_dir="", use_cpu=True, num_inference_steps=10, scale_with_latents=False)
    objective, grid = FlowGRPO(args, 1e-4), flow_timesteps(10)
    sampled = torch.randn(8, 64)
    states = SDESteps(x=sampled, t=grid[1:2].repeat(8), x_next=sampled, t_next=grid[2:3].repeat(8), velocity=sampled)
    width = objective.transition(states).b.abs()[0].item() / 64**0.5
    trained = sampled + 1e-4 / width * (torch.arange(8) < differ)[:, None]  # as a log-ratio, the clip range
    found = velocity_problem(ImageLoss(trained, states, True, objective, None), 0.5)
    assert (found is not None) == stops
    assert not stops or "differ by 100.0% of the clip range, the worst step by 100.0%" in found


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken_run_stops_at_once(make_trainer, monkeypatch, change, message):
    spy_paint(monkeypatch, change=change)
    trainer = make_trainer()
    with pytest.raises(TrustError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken_run_goes_on_where_told_to(make_trainer, monkeypatch, change, message):
    spy_paint(monkeypatch, change=change)
    with pytest.warns(UserWarning, match=message):
        make_trainer(trust_checks="warn", max_steps=1).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Start-up check")
        make_trainer(trust_checks="off", max_steps=1).train()


def test_sound_run_passes_and_each_check_runs_once(make_trainer):
    trainer = make_trainer(beta=0.1)
    trainer.train()
    (checks,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, TrustChecks)]
    of_the_image = {"states", "windows", "velocities", "regularizer", "reference"}
    assert checks._done == {"weights", "sampling", *of_the_image, "text KL"}


def test_dropout_is_found(make_trainer):
    class Dropping(BagelForUnifiedGeneration):
        def predict_velocity(self, *args, **kwargs):
            return torch.nn.functional.dropout(super().predict_velocity(*args, **kwargs), 0.1, self.training)

    with pytest.raises(TrustError, match="check dropout"):
        make_trainer(model=broken(Dropping)).train()


def test_regulariser_without_gradient_is_found(make_trainer):
    trainer = make_trainer()
    objective = trainer._setup.objective
    objective.regularizer = torch.no_grad()(objective.regularizer)
    with pytest.raises(TrustError, match="regulariser has no gradient"):
        trainer.train()


def test_one_step_more_or_less_than_the_paper_s_25_is_found():
    # verl-omni#279 at a real size: only the first step's noise differs, by 4 %.
    plan = RolloutPlan(flow_timesteps(25, 3), (512, 512), torch.tensor([0, 1, 2]))
    generators = [torch.Generator().manual_seed(seed) for seed in range(24)]
    start = draw_noise((64, 128), generators, range(24), "cpu")
    latents, tables = sample_latents(lambda x, t: -x, start, plan, generators)
    images = [Image(x, (512, 512), None, steps) for x, steps in zip(latents, tables, strict=True)]
    trajectories = [Trajectory("", [], rounds=[Round(images=[image])]) for image in images]

    def check(num_inference_steps):
        args = UniGRPOConfig(output_dir="", use_cpu=True, num_inference_steps=num_inference_steps)
        rollout = Rollout(trajectories, 24, FlowGRPO(args, 1e-6).transition, None)
        TrustChecks("raise").on_rollout(None, None, None, rollout=rollout)

    check(25)
    for steps in (24, 26):
        with pytest.raises(TrustError, match="times the power.*num_inference_steps"):
            check(steps)


def test_windows_of_processes_are_compared():
    def check(windows):
        TrustChecks("raise").on_rollout(None, None, None, rollout=Rollout([], 1, None, torch.tensor(windows)))

    check([[1.0, 0.9], [1.0, 0.9]])
    with pytest.raises(TrustError, match="processes drew different SDE windows"):
        check([[1.0, 0.9], [0.9, 0.8]])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_velocities_agree_within_the_float32_limit_on_ragged_batches(make_trainer, checkpointing):
    # Prompts and thinkings of other lengths in one micro-batch: padding must not show.
    trainer = make_trainer(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_completion_length=9,
        gradient_checkpointing=checkpointing,
        max_steps=1,
    )
    trainer.train()
    lengths = trainer._buffered_inputs[0]["completion_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
