"""The base model: how it is made, and the one that is shipped."""

import json

import numpy as np
import pytest
import torch

from tests.helpers.tiny_unified import moved, weights
from trl_unigrpo.experiments.base.build import STAGES, build_base, build_seeing_base, with_eyes
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.shapeworld import load_base
from trl_unigrpo.shapeworld.base import BASE, SEEING_BASE
from trl_unigrpo.shapeworld.evaluate import evaluate_model
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.shapeworld.second_corpus import FAULTLESS, SecondRates
from trl_unigrpo.shapeworld.second_look import evaluate_edits, evaluate_second_look, evaluate_stories, reading_accuracy
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer


@pytest.mark.slow
def test_what_is_built_loads_again(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build_base(
        tmp_path,
        autoencoder_steps=30,
        sft_steps=40,
        per_device_train_batch_size=16,
        logging_steps=10,
        disable_tqdm=True,
    )
    torch.set_num_threads(before)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    latents = torch.randn(2, 9, 8)
    some_images = [m.decode_latents(latents, (48, 48), output_type="pt") for m in (model, loaded)]
    assert torch.equal(*some_images)


def test_shipped_files_are_small_and_name_no_machine():
    assert sum(file.stat().st_size for folder in (BASE, SEEING_BASE) for file in folder.iterdir()) < 8_000_000
    for folder, seeing in ((BASE, False), (SEEING_BASE, True)):
        config = json.loads((folder / "config.json").read_text())
        assert not [name for name in config["vae_config"] if name.startswith("_") and name != "_class_name"]
        assert load_base(seeing)[1].get_vocab() == shapeworld_tokenizer(seeing).get_vocab()
    assert (BASE / "ae.safetensors").read_bytes() == (SEEING_BASE / "ae.safetensors").read_bytes()


@pytest.mark.slow
def test_shipped_base_scores_as_it_should():
    model, tokenizer = load_base()
    thinking = evaluate_model(model, tokenizer, 1050).reward.mean()
    direct = evaluate_model(model, tokenizer, 1050, thinking=False).reward.mean()
    assert 0.55 < thinking < 0.70
    assert direct < thinking - 0.10


def test_new_eyes_change_nothing_for_who_is_shown_nothing():
    base, tokenizer = load_base()
    model = with_eyes(base)
    assert model.config.llm_config.vocab_size == len(shapeworld_tokenizer(seeing=True)) > len(tokenizer)
    ids = tokenizer("two red circles", return_tensors="pt")["input_ids"]
    contexts = [ContextRow(ids[0])]
    latents, t = torch.randn(1, 9, 8), torch.tensor([0.7])
    velocities = [m.predict_velocity(m.encode_context(contexts), latents, t, (48, 48)) for m in (base, model)]
    assert torch.equal(*velocities)
    logits = [m(ids).logits[..., : len(tokenizer)] for m in (base, model)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)  # a wider head may add up in another order
    [shown] = model.read_images(render_images(np.full(9, 7)))
    assert (shown.latents.shape, shown.features.shape, shown.grid) == ((9, 8), (9, 64), (3, 3))


def test_a_seeing_base_learns_to_compare_then_mistakes_then_to_read_back():
    rates = FAULTLESS, SecondRates(), SecondRates(caption=0.4)
    assert [(stage.steps, stage.rates) for stage in STAGES] == list(zip((1000, 120, 150), rates, strict=True))


@pytest.mark.slow
def test_a_seeing_base_is_built_from_one_that_does_not_see(tmp_path):
    base, before = load_base()[0], weights(with_eyes(load_base()[0]))
    settings = {"per_device_train_batch_size": 8, "warmup_steps": 1, "disable_tqdm": True}
    model = build_seeing_base(
        base, tmp_path, stages=[stage._replace(steps=2) for stage in STAGES], num_own=7, **settings
    )
    changed = moved(before, weights(model))
    assert {"connector.fc1.weight", "vit_model.vision_model.embeddings.patch_embedding.weight"} <= changed
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    first = evaluate_model(loaded, shapeworld_tokenizer(seeing=True), 7)
    look = evaluate_second_look(loaded, shapeworld_tokenizer(seeing=True), first)
    assert (look.first == first.reward).all()
    assert all(a is b for a, b, kept in zip(first.images, look.images, look.kept, strict=True) if kept)


def test_evaluation_is_repeatable_and_reads_what_was_painted():
    model, tokenizer = load_base()
    first, again = (evaluate_model(model, tokenizer, 70) for _ in range(2))
    assert first.thinking == again.thinking
    assert (first.reward == again.reward).all()
    assert torch.equal(first.latents, again.latents)
    # A model that never saw an image scores about .1 here.
    assert first.reward.mean() > 0.5
    assert first.error.mean() < 0.01


def test_the_seeing_base_reads_and_repairs():
    model, tokenizer = load_base(seeing=True)
    assert reading_accuracy(model, tokenizer, 70) > 0.8
    first = evaluate_model(model, tokenizer, 70)
    assert first.reward.mean() > 0.5
    look = evaluate_second_look(model, tokenizer, first)
    assert (look.first == first.reward).all()
    assert 0.1 < look.kept.mean() < 0.7
    # Kept images are as they were; of the others, most keep what they were not to change.
    assert all((a is b) == bool(kept) for a, b, kept in zip(first.images, look.images, look.kept, strict=True))
    assert np.nanmean(look.harmed) < 0.35
    edits = evaluate_edits(model, tokenizer, 70).scores
    assert edits.kept.mean() > 0.8
    assert 0.2 < edits.reward.mean() < 0.8
    # Each turn of a story edits the image that the turn before left.
    told = evaluate_stories(model, tokenizer, 35)
    assert told.scores.reward.mean() < edits.reward.mean()
    assert 0.6 < told.untouched.mean() < 1
