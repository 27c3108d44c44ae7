"""Events that watchers are told of: held against what the rewards, the optimizer and the logs saw themselves."""

import math

import numpy as np
import pytest
from datasets import Dataset

from tests.helpers.tiny_unified import prompts_dataset
from trl_unigrpo.monitoring.events import Generation, Watcher


class Notes(Watcher):
    def __init__(self):
        self.generations, self.updates = [], []

    def on_generation(self, args, state, control, generation, **kwargs):
        self.generations.append((state.global_step, generation))

    def on_update(self, args, state, control, update, model, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.updates.append((state.global_step, update, math.sqrt(sum(float((g**2).sum()) for g in gradients))))


def test_a_generation_holds_what_the_rewards_saw(make_trainer):
    seen = []

    def by_place(prompts, completions, images, log_extra, **_):
        scores = [float(i) if i else None for i in range(len(images))]
        log_extra("answer", [f"{text} {i}" for i, text in enumerate(completions)])
        seen.append((prompts, completions, images))
        return scores

    def constant(images, **_):
        return [0.5] * len(images)

    notes = Notes()
    trainer = make_trainer(
        reward_funcs=[by_place, constant],
        callbacks=[notes],
        eval_dataset=prompts_dataset(copies=1),
        num_generations_eval=1,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    trainer.evaluate()
    assert [found.mode for _, found in notes.generations].count("eval") >= 1
    assert len(notes.generations) == len(seen)
    for (_, found), (prompts, completions, images) in zip(notes.generations, seen, strict=True):
        n = len(images)
        assert isinstance(found, Generation) and list(found.prompts) == prompts and list(found.thinking) == completions
        assert all(a is b for a, b in zip(found.images, images, strict=True))
        assert math.isnan(found.rewards["by_place"][0])
        # A sample that one function failed on counts for none; a group (here of one) without any is another case.
        assert math.isnan(found.rewards["constant"][0]) == (found.mode == "train")
        assert found.rewards["by_place"][1:] == [float(i) for i in range(1, n)]
        assert found.extra["answer"] == [f"{text} {i}" for i, text in enumerate(completions)]
        if found.mode == "train":
            groups = np.array(found.rewards["by_place"]).reshape(-1, found.group_size)
            signs = np.sign(groups - np.nanmean(groups, axis=1, keepdims=True))
            assert np.array_equal(np.sign(found.advantages), np.nan_to_num(signs).flatten())
    assert notes.generations[0][1].group_size == trainer.num_generations
    assert notes.generations[-1][1].group_size == 1


def test_an_update_holds_the_norms_before_clipping_and_the_step_s_own_metrics(make_trainer):
    notes = Notes()
    trainer = make_trainer(callbacks=[notes], max_grad_norm=1e-3, max_steps=4, logging_steps=1)
    trainer.train()
    assert [step for step, *_ in notes.updates] == [0, 1, 2, 3]
    for (_, update, clipped), entry in zip(notes.updates, trainer.state.log_history, strict=False):
        for name in ("text", "image"):
            assert update.grad_norm[name] == pytest.approx(entry[f"grad_norm/{name}"])
        expected = math.sqrt(sum(min(norm, 1e-3) ** 2 for norm in update.grad_norm.values()))
        assert clipped == pytest.approx(expected, rel=1e-3)
        for name, value in update.metrics.items():
            assert value == pytest.approx(entry[name]), name
        assert "flow/velocity_mse" in update.metrics


def test_conversations_stay_as_they_are(make_trainer):
    notes = Notes()
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a red cat", "a small tree")]
    trainer = make_trainer(train_dataset=Dataset.from_list(rows * 4), callbacks=[notes], max_steps=1)
    trainer.train()
    assert notes.generations[0][1].prompts[0][-1]["role"] == "user"
