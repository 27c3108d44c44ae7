"""TRL's private hooks: each change to them ends in an error that says so, before or at the first use."""

import inspect

import pytest
import torch
from trl import GRPOTrainer

from tests.helpers.tiny_unified import images_of, weights
from trl_unigrpo.trainers.trl_bridge import (
    ATTRIBUTES,
    HOOKS,
    TRLChangedError,
    check_trl,
    generation_fields,
)
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


def test_installed_trl_is_the_one_expected():
    check_trl()


def test_every_override_of_a_private_method_is_a_checked_hook():
    overridden = {
        name
        for name, member in vars(UniGRPOTrainer).items()
        if inspect.isfunction(member)
        and hasattr(GRPOTrainer, name)
        and name not in ("__init__", "create_model_card", "evaluate")
    }
    assert overridden <= set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_hook_that_is_gone(make_trainer, monkeypatch, name):
    for owner in GRPOTrainer.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    with pytest.raises(TRLChangedError, match=f"GRPOTrainer.{name} is gone") as caught:
        make_trainer()
    assert "Install such a version (pip install 'trl>=1.16,<1.17')" in str(caught.value)


@pytest.mark.parametrize("name", HOOKS)
def test_hook_with_other_parameters(make_trainer, monkeypatch, name):
    monkeypatch.setattr(GRPOTrainer, name, lambda self, something_else: None)
    if HOOKS[name] == ("self",):
        monkeypatch.setattr(GRPOTrainer, name, lambda trainer: None)
    with pytest.raises(TRLChangedError, match=rf"GRPOTrainer.{name} takes .*, expected \('self'"):
        make_trainer()


def test_loss_that_trl_would_scale_again(make_trainer, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "loss_is_scaled_for_ga", False)
    with pytest.raises(TRLChangedError, match="loss_is_scaled_for_ga"):
        make_trainer()


@pytest.mark.parametrize(
    "outputs",
    [
        ([[1]], [[2]], None, ["a"]),
        ([[1]], [[2]], {}, {}),
        ([[1]], [[2], [3]], {}),
        (torch.ones(1, 1), [[2]], {}),
        ({}, [[1]], [[2]]),
        (["text"], [[2]], {}),
    ],
    ids=["no-dict", "two-dicts", "lengths", "tensors", "other-order", "texts"],
)
def test_other_outputs_of_generate(make_trainer, monkeypatch, outputs):
    with pytest.raises(TRLChangedError, match=r"GRPOTrainer\._generate no longer returns"):
        generation_fields(outputs)
    trainer = make_trainer()
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda self, prompts: outputs)
    with pytest.raises(TRLChangedError, match=r"GRPOTrainer\._generate no longer returns"):
        trainer.train()


def test_loss_that_does_not_ask_for_log_probs_through_the_hook(make_trainer, monkeypatch):
    def other_loss(self, model, inputs):
        return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", other_loss)
    trainer = make_trainer()
    before = weights(trainer.model)
    with pytest.raises(TRLChangedError, match="did not call _get_per_token_logps_and_entropies"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer.model).items())


def test_extra_fields_that_no_longer_reach_the_rewards(make_trainer, monkeypatch):
    trainer = make_trainer()
    own = UniGRPOTrainer._generate

    def lost(self, prompts):
        return tuple({} if isinstance(value, dict) else value for value in own(self, prompts))

    monkeypatch.setattr(UniGRPOTrainer, "_generate", lost)
    with pytest.raises(TRLChangedError, match="extra fields .* do not reach the rewards"):
        trainer.train()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_that_is_gone(make_trainer, monkeypatch, name):
    initialise = GRPOTrainer.__init__

    def other(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if ATTRIBUTES[name]:
            getattr(self, name).pop(ATTRIBUTES[name][-1])
        else:
            delattr(self, name)

    monkeypatch.setattr(GRPOTrainer, "__init__", other)
    with pytest.raises(TRLChangedError, match=rf"GRPOTrainer\.{name} has no key|GRPOTrainer has no attribute {name}"):
        make_trainer()


def test_images_are_kept_as_long_as_the_other_logs(make_trainer):
    trainer = make_trainer()
    assert trainer._logs["images"].maxlen == trainer._logs["prompt"].maxlen == trainer._progress.images.maxlen == 8


def test_rows_of_a_batch_are_kept_together_by_trls_shuffle(make_trainer, train):
    # Trajectories are a list beside TRL's tensors: after the shuffle each still belongs to its row.
    seen = train(make_trainer(max_steps=1))
    for batch in seen.batches:
        for row, image in enumerate(images_of([batch])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            thinking = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            context = image.context.ids.tolist()
            assert context[: len(prompt) + len(thinking)] == prompt + thinking
            assert context[-1] == 2
