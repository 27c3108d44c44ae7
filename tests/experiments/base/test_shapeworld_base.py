"""The base model: how it is made, and the one that is shipped."""

import json

import pytest
import torch

from trl_unigrpo.experiments.base.build import build_base
from trl_unigrpo.shapeworld import load_base
from trl_unigrpo.shapeworld.base import BASE
from trl_unigrpo.shapeworld.evaluate import evaluate_model
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
    pictures = [m.decode_latents(latents, (48, 48), output_type="pt") for m in (model, loaded)]
    assert torch.equal(*pictures)


def test_shipped_files_are_small_and_name_no_machine():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 5_000_000
    config = json.loads((BASE / "config.json").read_text())
    assert not [name for name in config["vae_config"] if name.startswith("_") and name != "_class_name"]
    assert load_base()[1].get_vocab() == shapeworld_tokenizer().get_vocab()


@pytest.mark.slow
def test_shipped_base_scores_as_it_should():
    model, tokenizer = load_base()
    thinking = evaluate_model(model, tokenizer, 1050).reward.mean()
    direct = evaluate_model(model, tokenizer, 1050, thinking=False).reward.mean()
    assert 0.55 < thinking < 0.70
    assert direct < thinking - 0.10


def test_evaluation_is_repeatable_and_reads_what_was_painted():
    model, tokenizer = load_base()
    first, again = (evaluate_model(model, tokenizer, 70) for _ in range(2))
    assert first.thinking == again.thinking
    assert (first.reward == again.reward).all()
    assert torch.equal(first.latents, again.latents)
    # A model that never saw a picture scores about .1 here.
    assert first.reward.mean() > 0.5
    assert first.error.mean() < 0.01
