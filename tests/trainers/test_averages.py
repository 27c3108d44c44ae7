"""Averaged weights: what they are, who paints with them, and what is evaluated and saved."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.helpers.runs import alarms_of, assert_same_update
from tests.helpers.tiny_unified import PROMPTS, moved, prompts_dataset, redness, spy_paint, weights
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig


BOTH = {"image_objective": "nft", "image_old_policy_decay": 0.75, "ema_decay": 0.5}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1}


class Recorded(TrainerCallback):
    """The trained weights, and those of both averages, before the training and after each optimizer step."""

    def __init__(self, trainer):
        self.trainer, self.trained, self.old, self.ema = trainer, [], [], []
        trainer.add_callback(self)

    def record(self, *args, **kwargs):
        averages = self.trainer._averages
        own = {n: p.detach().clone() for n, p in self.trainer.unified.named_parameters() if p.requires_grad}
        self.trained.append(own)
        for name in ("old", "ema"):
            if (average := getattr(averages, name)) is not None:
                getattr(self, name).append({n: w.clone() for n, w in average.weights.items()})

    on_train_begin = on_step_end = record


def blended(before, latest, decay):
    return {name: decay * before[name].double() + (1 - decay) * latest[name].double() for name in before}


def assert_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight.double(), rtol=0, atol=2e-7, msg=name)


def with_weights(model, values):
    """A copy of a model that holds other values of some of its weights."""
    other = copy.deepcopy(model)
    parameters = dict(other.named_parameters())
    for name, value in values.items():
        parameters[name].data = value.clone()
    return other


ADAPTED = pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])


@ADAPTED
def test_averages_follow_their_recursions(make_trainer, adapted):
    trainer = make_trainer(max_steps=6, peft_config=LoraConfig(r=2) if adapted else None, **BOTH)
    recorded = Recorded(trainer)
    trainer.train()
    image = {name for name in recorded.trained[0] if trainer.unified.is_image_parameter(name)}
    assert 0 < len(image) < len(recorded.trained[0])
    start = recorded.trained[0]
    ema, old = start, {name: start[name] for name in image}
    for step in range(1, 7):
        ema = blended(ema, recorded.trained[step], min(0.5, (1 + step) / (10 + step)))
        assert_weights(recorded.ema[step], ema)
        if step > 2 and step % 2:  # the first of the two passes over a generation, which moves it before it paints
            old = blended(old, recorded.trained[step - 1], 0.75)
        assert_weights(recorded.old[step], old)
    last = weights(trainer.unified)
    assert_weights({name: last[name] for name in ema}, ema)  # what the model holds in the end
    frozen = last.keys() - ema.keys()
    assert bool(frozen) == adapted


def test_decay_of_the_old_policy_rises(make_trainer):
    trainer = make_trainer(max_steps=6, image_old_policy_warmup_steps=4, **{**BOTH, "ema_decay": None})
    recorded = Recorded(trainer)
    trainer.train()
    old = {name: recorded.trained[0][name] for name in recorded.old[0]}
    for step, decay in ((2, 0.75 * 2 / 4), (4, 0.75)):
        old = blended(old, recorded.trained[step], decay)
        assert_weights(recorded.old[step + 1], old)


def test_several_generations_of_one_optimizer_step_share_their_old_policy(make_trainer):
    cut = {"num_iterations": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    trainer = make_trainer(**cut, **BOTH)
    recorded = Recorded(trainer)
    trainer.train()
    assert trainer.generation == 4
    old = {name: recorded.trained[0][name] for name in recorded.old[0]}
    assert_weights(recorded.old[2], blended(old, recorded.trained[1], 0.75))


@pytest.mark.parametrize(
    ("objective", "adapted"),
    [
        ("nft", True),
        ("awm", False),
        ("fpo", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("nft", False), ("awm", True), ("fpo", True))),
    ],
)
def test_the_old_policy_paints_and_gives_the_old_velocities(make_trainer, train, monkeypatch, objective, adapted):
    settings = {**BOTH, "image_objective": objective, "max_steps": 4}
    trainer = make_trainer(peft_config=LoraConfig(r=2) if adapted else None, **settings)
    model, recorded, painters = trainer.unified, Recorded(trainer), []
    spy_paint(monkeypatch, change=lambda images: painters.append(weights(model)) or images)
    seen = train(trainer)
    assert len(painters) == 2  # generations
    for place, batch in enumerate(seen.batches):
        generation = place // 4  # of two micro-batches and two passes
        begin, trained = 2 * generation, recorded.trained[2 * generation]
        old = recorded.old[begin + 1]
        assert not moved({**trained, **old}, {name: painters[generation][name] for name in trained})
        with torch.no_grad():
            expected = with_weights(model, {**trained, **old}).predict_velocities(batch["steps"])
            trained_ones = with_weights(model, trained).predict_velocities(batch["steps"])
        torch.testing.assert_close(batch["old"], expected, rtol=1e-5, atol=1e-6)
        assert generation == 0 or not torch.allclose(batch["old"], trained_ones, rtol=1e-3, atol=1e-4)


def test_no_lag_is_no_average(make_trainer):
    """An old policy of decay 0 is the trained one of a pass ago: the same update, of velocities computed apart."""
    plain = {"optim": "sgd", "learning_rate": 0.5, "image_learning_rate": 0.5, "image_objective": "nft"}
    after = []
    for decay in (None, 0.0):
        trainer = make_trainer(max_steps=4, image_old_policy_decay=decay, **plain)
        before, recorded = weights(trainer.unified), Recorded(trainer)
        trainer.train()
        after.append(weights(trainer.unified))
    assert not moved(recorded.old[3], recorded.trained[2])
    assert_same_update(before, *after)


def test_what_is_averaged_for_evaluation_changes_nothing_of_the_training(make_trainer):
    trained = []
    for settings in ({}, {"ema_decay": 0.9, "eval_strategy": "steps", "eval_steps": 1}):
        evaluated = prompts_dataset(PROMPTS[:2], 1) if settings else None
        trainer = make_trainer(max_steps=3, eval_dataset=evaluated, **settings)
        recorded = Recorded(trainer)
        trainer.train()
        trained.append(recorded.trained)
    for without, averaged in zip(*trained, strict=True):
        assert not moved(without, averaged)
    assert moved(trained[0][-1], {name: weights(trainer.unified)[name] for name in trained[0][-1]})


@ADAPTED
def test_the_average_is_evaluated_and_saved(make_trainer, tmp_path, monkeypatch, adapted):
    given = {"peft_config": LoraConfig(r=2) if adapted else None, "eval_dataset": prompts_dataset(PROMPTS, 1)}
    trainer = make_trainer(max_steps=3, eval_strategy="steps", eval_steps=3, **CHECKPOINTS, **given, **BOTH)
    model, recorded, painters = trainer.unified, Recorded(trainer), []
    spy_paint(monkeypatch, change=lambda images: painters.append(weights(model)) or images)
    trainer.train()
    average = recorded.ema[3]
    assert not moved(average, {name: painters[-1][name] for name in average})
    (evaluated,) = [log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log]

    file = f"{'adapter_model' if adapted else 'model'}.safetensors"
    saved = load_file(tmp_path / "checkpoint-3" / file)
    trainer.save_model(tmp_path / "final")
    final = load_file(tmp_path / "final" / file)
    assert not moved(saved, final)
    names = {name.replace(".default", ""): name for name in average}
    found = {names[k]: v for key, v in saved.items() if (k := key.removeprefix("base_model.model.")) in names}
    assert_weights(found, average)

    second = make_trainer(tmp_path / "second", **given)
    for name, parameter in second.unified.named_parameters():
        if name in average:
            parameter.data = average[name].clone()
    assert second.evaluate()["eval_reward"] == evaluated == trainer.evaluate()["eval_reward"]


def test_the_best_model_is_the_average_that_was_evaluated(make_trainer, tmp_path):
    calls = iter(range(100))

    def falling(images, **columns):
        before = next(calls)  # so that the first evaluation is the best
        return [score - before for score in redness(images=images, **columns)]

    trainer = make_trainer(
        reward_funcs=falling,
        eval_dataset=prompts_dataset(PROMPTS[:1], 1),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        max_steps=3,
        ema_decay=0.9,
        **CHECKPOINTS,
    )
    recorded = Recorded(trainer)
    trainer.train()
    assert trainer.state.best_global_step == 1
    last = weights(trainer.unified)
    assert_weights({name: last[name] for name in recorded.ema[1]}, recorded.ema[1])
    assert moved(recorded.ema[1], recorded.ema[3])


def test_resuming_with_other_averages(make_trainer, tmp_path):
    """A finished run holds its average; the trained weights go on; an average that is missing starts from them."""
    trainer = make_trainer(tmp_path / "whole", max_steps=2, **CHECKPOINTS, ema_decay=0.9)
    recorded = Recorded(trainer)
    trainer.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    finished = make_trainer(tmp_path / "finished", max_steps=2, ema_decay=0.9)
    finished.train(resume_from_checkpoint=checkpoint)
    assert not moved(recorded.ema[2], weights(finished.unified))
    without = make_trainer(tmp_path / "without", max_steps=3, **CHECKPOINTS)
    other = Recorded(without)
    without.train(resume_from_checkpoint=checkpoint)
    assert not moved(recorded.trained[2], other.trained[0])

    average = make_trainer(tmp_path / "average", max_steps=4, ema_decay=0.5)
    other = Recorded(average)
    with pytest.warns(UserWarning, match=r"checkpoint-3 holds no average for ema_decay: it starts from the weights"):
        average.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-3"))
    assert not moved(other.trained[0], other.ema[0])


def test_averages_of_another_model_are_refused(make_trainer, tmp_path):
    make_trainer(tmp_path / "whole", max_steps=1, **CHECKPOINTS, ema_decay=0.9).train()
    file = tmp_path / "whole" / "checkpoint-1" / "averages.pt"
    state = torch.load(file, weights_only=True)
    name, weight = state["ema"].popitem()
    torch.save(state | {"ema": {**state["ema"], f"other.{name}": weight}}, file)
    with pytest.raises(
        ValueError, match=r"averaged weights in the checkpoint are not those of this model: '?.* differs"
    ):
        make_trainer(tmp_path / "on", max_steps=2, ema_decay=0.9).train(resume_from_checkpoint=str(file.parent))


@pytest.mark.parametrize("lags", [False, True])
def test_alarms_know_that_the_old_policy_lags(make_trainer, lags):
    trainer = make_trainer(image_objective="awm", image_old_policy_decay=0.9 if lags else None, max_steps=4)
    trainer.train()
    logs = [log["flow/log_ratio_std"] for log in trainer.state.log_history if "flow/log_ratio_std" in log]
    series = alarms_of(trainer).state()["attributes"]["memory"]["tripwire"]["series"]
    assert max(logs) > 1e-7 and "flow/velocity_mse" in series
    assert ("flow/log_ratio_std" in series) != lags


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay=1.0: expected a number from 0 to below 1, such as 0.9, or None"),
        ({"ema_decay": float("nan")}, r"ema_decay=nan: expected a number from 0 to below 1"),
        ({**BOTH, "image_old_policy_decay": -0.1}, r"image_old_policy_decay=-0.1: expected a number from 0"),
        ({"image_old_policy_decay": 0.5}, r"image_objective='flow_grpo': its ratio is .* Use 'nft', 'awm' or 'fpo'"),
        ({**BOTH, "flow_weight": 0.0}, r"image_old_policy_decay=0.75 with flow_weight=0: no weights .* raise flow_w"),
        ({"image_old_policy_warmup_steps": 9}, r"warmup_steps=9 with image_old_policy_decay=None: .* Set image_old_"),
        ({**BOTH, "image_old_policy_warmup_steps": -1}, r"image_old_policy_warmup_steps=-1 .* expected 0 or more"),
    ],
)
def test_decays_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        UniGRPOConfig(str(tmp_path), use_cpu=True, **settings)
