"""Images that nothing can be learnt from: left out of the forward, while the update stays the same."""

import pytest
import torch
from peft import LoraConfig

from tests.helpers.tiny_unified import OneByOne, broken, weights
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer
from trl_unigrpo.trajectory import Steps


SGD = {"optim": "sgd", "learning_rate": 0.5, "image_learning_rate": 0.05, "max_grad_norm": 0.0}
NO_TIE = {"flow_regularizer": "none"}


def one_dead_group(images, **columns):
    """Of each two groups the first gets one reward, whose mean of four is not itself in float32."""
    return [0.7 if i % 8 < 4 else float(i % 8) ** 2 for i in range(len(images))]


def all_dead(images, **columns):
    return [0.7] * len(images)


class Whole(UniGRPOTrainer):
    """One that trains dead images as any other, by their advantage of 0."""

    def _leave_out_dead(self, trajectories, outputs):
        return


def trained(make_trainer, train, folder, trainer_class=UniGRPOTrainer, reward=one_dead_group, **settings):
    model = broken(OneByOne) if settings.pop("one_by_one", False) else None
    trainer = make_trainer(folder, model=model, reward_funcs=reward, trainer_class=trainer_class, **settings)
    sizes, velocities = [], trainer.unified.velocities

    def counted(steps, *args, **kwargs):
        sizes.append(len(steps))
        return velocities(steps, *args, **kwargs)

    trainer.unified.velocities = counted
    return trainer, train(trainer), sizes


def assert_same_weights(one, other, **tolerance):
    found, expected = weights(one.model), weights(other.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **(tolerance or {"rtol": 0, "atol": 2e-6}))


CASES = {
    "flow_grpo": {},
    "fpo": {"image_objective": "fpo", "matching_samples": 3},
    "awm, one by one": {"image_objective": "awm", "matching_samples": 2, "one_by_one": True},
    "an update a micro-batch": {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
    "guided": {"guidance_scale": 2.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_update_without_dead_images_is_the_update_with_them(make_trainer, train, tmp_path, case):
    runs = [
        trained(make_trainer, train, tmp_path / cls.__name__, cls, **{**SGD, **NO_TIE, **case})
        for cls in (UniGRPOTrainer, Whole)
    ]
    (left, seen, _), (whole, all_seen, _) = runs
    assert_same_weights(left, whole)
    logs, expected = left.state.log_history, whole.state.log_history
    for log, other in zip(logs[:-1], expected[:-1], strict=True):
        assert log["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert log["flow/loss"] == pytest.approx(other["flow/loss"], abs=1e-7)
    assert logs[0]["flow/frac_dead"] == 0.5 and "flow/frac_dead" not in expected[0]
    for batch, full in zip(seen.batches, all_seen.batches, strict=True):
        dead = batch["advantages"] == 0
        assert dead.tolist() == [t.rounds[0].images[0].dead for t in batch["trajectories"]]
        assert len(full["steps"]) > len(batch["steps"]) == len(full["steps"]) * (~dead).sum() / len(dead)
    moved = max(
        (a - b).abs().max() for a, b in zip(seen.weights[0].values(), weights(left.model).values(), strict=True)
    )
    assert moved > 1e-3


@pytest.mark.parametrize("text_weight", [1.0, 0.0])
@pytest.mark.parametrize("lora", [False, True])
def test_generation_of_dead_images_alone_moves_what_momentum_moves(make_trainer, train, tmp_path, text_weight, lora):
    """Its gradient is 0 and not none: Adam goes on as it does where they are in the forward."""
    calls = []

    def reward(images, **columns):
        calls.append(1)
        return one_dead_group(images)[::-1] if len(calls) == 1 else all_dead(images)

    runs = []
    for cls in (UniGRPOTrainer, Whole):
        calls.clear()
        settings = {**NO_TIE, "text_weight": text_weight, "num_iterations": 1, "max_steps": 2}
        settings["peft_config"] = LoraConfig(r=2) if lora else None
        runs.append(trained(make_trainer, train, tmp_path / cls.__name__, cls, reward, **settings))
    (left, seen, _), (whole, *_) = runs
    assert left.state.log_history[1]["flow/frac_dead"] == 1
    assert left.state.log_history[1]["grad_norm/image"] == 0
    assert_same_weights(left, whole, rtol=0, atol=1e-5)
    before, after = seen.weights[1], weights(left.model)
    assert any(not torch.equal(before[n], after[n]) for n in before if left.unified.is_image_parameter(n))


def test_rounding_is_no_advantage(make_trainer, train, tmp_path):
    """TRL divides what is left of .7 - mean by 1e-4."""
    rewards = torch.tensor([0.7] * 12)
    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert advantage.abs().max() > 1e-4  # what TRL makes of it
    settings = {"num_generations": 12, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    settings |= {"num_iterations": 1, "max_steps": 1}
    trainer, seen, _ = trained(make_trainer, train, tmp_path, reward=all_dead, **settings)
    assert [batch["advantages"].tolist() for batch in seen.batches] == [[0.0] * 12]
    assert trainer.state.log_history[0]["grad_norm/text"] == 0


@pytest.mark.parametrize("objective", ["flow_grpo", "nft"])
@pytest.mark.parametrize("dead", [True, False])
def test_regulariser_is_over_the_dead_too_unless_told(make_trainer, train, tmp_path, objective, dead):
    settings = {**SGD, "image_objective": objective, "matching_samples": 2, "train_dead_images": dead}
    trainer, seen, sizes = trained(make_trainer, train, tmp_path, **settings)
    images = [image for batch in seen.batches[:2] for t in batch["trajectories"] for _, image in t.painted()]
    assert sum(image.dead for image in images) == (0 if dead else 4)
    steps = sum(len(image.steps) for image in images)
    assert sizes[:2] == ([steps // 2] * 2 if dead else sizes[:2]) and sum(sizes[:2]) == steps  # the reference's
    log = trainer.state.log_history[1]
    assert log["flow/velocity_mse"] > 0
    for batch in seen.batches:
        shares = [image.share for t in batch["trajectories"] for _, image in t.painted()]
        assert shares == [1.0 if dead else 2.0 * (a != 0) for a in batch["advantages"].tolist()]
    table = Steps.of([t for batch in seen.batches[:2] for t in batch["trajectories"]])
    values = torch.arange(1.0, len(table) + 1)
    assert table.mean_of_live(values).item() == pytest.approx(values.mean().item())  # whatever the tables it is cut in


def test_old_policy_of_dead_images_is_not_asked(make_trainer, train, tmp_path):
    """Where updates are smaller than generations, old velocities are computed before them."""
    settings = {**SGD, **NO_TIE, "gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 2}
    trainer, seen, sizes = trained(make_trainer, train, tmp_path, **settings)
    live = [
        image for batch in seen.batches for t in batch["trajectories"] for _, image in t.painted() if not image.dead
    ]
    assert len(live) == 4 and sum(sizes) == sum(len(image.steps) for image in live)
    assert len(trainer._kept.state()["old"]) == 4
