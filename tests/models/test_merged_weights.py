"""Weights with adapters merged into them, as another engine gets them, beside PEFT's own merging."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.helpers.tiny_pipelines import qwen3
from trl_unigrpo.models.adapters import merged_weights


def everything(name):
    return False


def thinker(tied=False):
    model = qwen3(language_head=True)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
        model.config.tie_word_embeddings = False
    return model


def adapted(config, dtype=torch.bfloat16, tied=False):
    """A language model with random adapters, its weights in half precision, where merging and unmerging rounds."""
    torch.manual_seed(0)
    model = get_peft_model(thinker(tied).to(dtype), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "dora", "modules-to-save", "tokens", "ia3"],
)
def test_as_peft_merges_them_and_left_as_they_were(config):
    model = adapted(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = dict(merged_weights(model.get_base_model(), everything))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(getattr(module, "merged", False) for module in model.modules())
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert list(found) == list(expected)  # the order, too
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = dict(thinker().to(torch.bfloat16).named_parameters())
    assert list(plain) == list(found) and any(not torch.equal(plain[name], found[name]) for name in plain)


def test_what_peft_merges_and_unmerges_is_not_what_it_was():
    """Why layers get their own numbers back."""
    model = adapted(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_that_are_not_wanted_are_not_merged(monkeypatch):
    model = adapted(LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).get_base_model()
    unwanted = [module for name, module in model.named_modules() if name.endswith("v_proj")]
    for module in unwanted:
        monkeypatch.setattr(module, "merge", None)
    found = [name for name, _ in merged_weights(model, lambda name: "v_proj" in name)]
    whole = [name for name, _ in thinker().named_parameters()]
    assert found == [name for name in whole if "v_proj" not in name]


def test_tied_weights_come_once_and_sharded_ones_whole():
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"]), torch.float32, tied=True)
    base = model.get_base_model()
    expected = {name: value.clone() for name, value in merged_weights(base, everything)}
    assert "lm_head.weight" not in expected and "model.embed_tokens.weight" in expected
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for layer in base.model.layers:
            fully_shard(layer)
        fully_shard(model)
        found = dict(merged_weights(base, everything))
        assert all(isinstance(value, DTensor) for value in found.values())
        assert {name: value.full_tensor().tolist() for name, value in found.items()} == {
            name: value.tolist() for name, value in expected.items()
        }
    finally:
        distributed.destroy_process_group()


def test_an_adapter_of_one_of_two_tied_layers():
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = adapted(LoraConfig(r=2, target_modules=["lm_head"]), tied=True)
    with pytest.raises(ValueError, match=r"lm_head is adapted and tied to another layer: leave it out of target_mod"):
        list(merged_weights(model.get_base_model(), everything))
