"""Adapters: where they go, at which rank, that they come back from disk, and that the base is held once."""

import gc
import re

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from tests.helpers.adapters import BOTH, assert_same_outputs, difference, outputs
from tests.helpers.paths import FIXTURES
from tests.helpers.tiny_unified import (
    IMAGE_SIZE,
    moved,
    prompts_dataset,
    redness,
    tiny_bagel,
    tiny_config,
    tiny_tokenizer,
    weights,
)
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.models.registry import load_unified_model
from trl_unigrpo.trainers.refl_trainer import ReFLConfig, ReFLTrainer
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


RELEASED_KEYS = FIXTURES / "bagel" / "released_keys.txt"


def with_tower(model):
    """The model, with the names of the released understanding tower."""

    def group(**children):
        module = nn.Module()
        for name, child in children.items():
            module.add_module(name, child)
        return module

    attention = group(**{f"{name}_proj": nn.Linear(8, 8) for name in ("q", "k", "v", "out")})
    block = group(self_attn=attention, mlp=group(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 8)))
    model.vit_model = group(vision_model=group(encoder=group(layers=nn.ModuleList([block]))))
    model.connector = group(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 8))
    return model


@pytest.fixture
def folder(tmp_path):
    """A saved model with its tokenizer."""
    tiny_bagel().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Where adapters go


@pytest.mark.parametrize("experts", ["text", "image", "both"])
def test_default_targets_are_seven_linear_layers_of_each_expert(experts):
    keys = [line.split()[0].replace("{i}", "5") for line in RELEASED_KEYS.read_text().splitlines()]
    modules = {key.rpartition(".")[0] for key in keys}
    assert any(name.startswith("vit_model.") for name in modules) and "connector.fc1" in modules
    pattern = re.compile(tiny_bagel().default_lora_targets(experts))
    layer = "language_model.model.layers.5."
    expected = set()
    for suffix in {"text": [""], "image": ["_moe_gen"], "both": ["", "_moe_gen"]}[experts]:
        expected |= {f"{layer}self_attn.{name}_proj{suffix}" for name in "qkvo"}
        expected |= {f"{layer}mlp{suffix}.{name}_proj" for name in ("gate", "up", "down")}
    assert {name for name in modules if pattern.fullmatch(name)} == expected


def test_tower_is_left_alone_and_training_goes_on_without_it(make_trainer):
    trainer = make_trainer(model=with_tower(tiny_bagel()), peft_config=LoraConfig(r=2))
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    assert changed
    assert not any("vit_model" in name or "connector" in name for name in changed)


REFUSED = {
    "a list that reaches the tower": (
        {"target_modules": ["q_proj", "fc1"]},
        r"match 3 modules of vit_model and connector.*'vit_model\.vision_model\.encoder\.layers\.0\.self_attn\.q_proj'"
        r".*'connector\.fc1'\. Leave target_modules unset",
    ),
    "every linear layer": ({"target_modules": "all-linear"}, r"match 8 modules of vit_model and connector"),
    "a pattern that reaches the tower": ({"target_modules": r".*q_proj.*"}, r"match 1 modules of vit_model"),
    "a misspelt list": (
        {"target_modules": ["query_proj"]},
        r"'query_proj' match no module.*Leave target_modules unset",
    ),
    "a list that is misspelt in part": ({"target_modules": ["o_proj", "gateproj"]}, r"'gateproj' match no module"),
    "a pattern of part of a name": ({"target_modules": "q_proj_moe_gen"}, r"'q_proj_moe_gen' match no module"),
    "a rank for nothing": (
        {"rank_pattern": {"mot_gen": 4}},
        r"rank_pattern 'mot_gen' match none of the adapted modules.*regular expression",
    ),
    "a scale for nothing": (
        {"target_modules": ["o_proj"], "alpha_pattern": {".*moe_gen.*": 4}},
        r"alpha_pattern '\.\*moe_gen\.\*' match none of the adapted modules, which are 'language_model\.\S+o_proj'",
    ),
    "a misspelt whole module": ({"modules_to_save": ["llm2vea"]}, r"modules_to_save 'llm2vea' match no module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_would_go_astray_are_refused(make_trainer, case):
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_trainer(model=with_tower(tiny_bagel()), peft_config=LoraConfig(r=2, **config))


def test_adapters_that_would_go_astray_are_refused_before_weights_are_read(folder, tmp_path):
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="'query_proj' match no module"):
        UniGRPOTrainer(
            model=str(folder),
            reward_funcs=redness,
            args=tiny_config(tmp_path),
            train_dataset=prompts_dataset(),
            peft_config=LoraConfig(target_modules=["query_proj"]),
        )


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["o_proj", "o_proj_moe_gen"], {"self_attn.o_proj", "self_attn.o_proj_moe_gen"}),
        (r".*\.mlp(_moe_gen)?\.up_proj", {"mlp.up_proj", "mlp_moe_gen.up_proj"}),
    ],
)
def test_targets_of_the_user_are_taken(make_trainer, targets, adapted):
    trainer = make_trainer(model=with_tower(tiny_bagel()), peft_config=LoraConfig(r=2, target_modules=targets))
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {re.search(r"layers\.\d+\.(.*)\.lora_", name)[1] for name in names} == adapted


# Ranks


@pytest.mark.parametrize("key", [".*moe_gen.*", tiny_bagel().default_lora_targets("image")], ids=["short", "default"])
def test_each_expert_has_its_own_rank_and_scale_on_disk_too(make_trainer, tmp_path, key):
    config = LoraConfig(r=2, lora_alpha=6, rank_pattern={key: 4}, alpha_pattern={key: 20})
    trainer = make_trainer(peft_config=config, output_dir=tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "run")
    loaded = PeftModel.from_pretrained(tiny_bagel(), tmp_path / "run")
    for model in (trainer.model, loaded):
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert len(layers) == 2 * 2 * 7
        for name, layer in layers.items():
            rank, scale = (4, 20 / 4) if "moe_gen" in name else (2, 6 / 2)
            assert layer.lora_A["default"].weight.shape[0] == layer.lora_B["default"].weight.shape[1] == rank
            assert layer.scaling["default"] == scale
    assert_same_outputs(outputs(loaded), outputs(trainer.model))


# From disk and into the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_comes_back_bit_for_bit(make_trainer, folder, tmp_path, dtype):
    model = BagelForUnifiedGeneration.from_pretrained(folder, dtype=dtype)
    trainer = make_trainer(model=model, peft_config=LoraConfig(r=2), bf16=dtype == torch.bfloat16, max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    expected = outputs(trainer.model)
    base = BagelForUnifiedGeneration.from_pretrained(folder, dtype=dtype)
    assert difference(outputs(base), expected) > 1e-3
    assert_same_outputs(outputs(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)


@pytest.fixture
def stage_one(make_trainer, folder, tmp_path):
    """A folder of adapters that were trained, and what they compute."""
    trainer = make_trainer(model=str(folder), peft_config=LoraConfig(r=2, lora_alpha=8))
    trainer.train()
    trainer.save_model(tmp_path / "stage-one")
    return str(tmp_path / "stage-one"), outputs(trainer.model)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, lora_alpha=8)])
def test_training_goes_on_with_the_adapters_of_a_folder(make_trainer, tmp_path, stage_one, peft_config):
    source, before = stage_one
    if peft_config is None:
        trainer = make_trainer(model=source, output_dir=tmp_path / "two")
    else:
        with pytest.warns(UserWarning, match="holds adapters: training goes on with them. peft_config is not used"):
            trainer = make_trainer(model=source, output_dir=tmp_path / "two", peft_config=peft_config)
    assert_same_outputs(outputs(trainer.model), before)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default." in name for name in trained)
    start = weights(trainer.model)
    trainer.train()
    assert moved(start, weights(trainer.model)) <= trained
    trainer.save_model(tmp_path / "two")
    base = PeftConfig.from_pretrained(tmp_path / "two").base_model_name_or_path
    again = PeftModel.from_pretrained(BagelForUnifiedGeneration.from_pretrained(base), tmp_path / "two")
    assert_same_outputs(outputs(again), outputs(trainer.model))
    assert difference(outputs(again), before) > 1e-4


def test_refl_and_fine_tuning_go_on_with_the_adapters_of_a_folder(tmp_path, stage_one):
    source, before = stage_one
    common = {"train_dataset": prompts_dataset(completion=[""] * 4, image=[None] * 4)}
    refl = ReFLTrainer(source, lambda pixels, *_, **__: pixels.mean((1, 2, 3)), small(ReFLConfig, tmp_path), **common)
    sft = UnifiedSFTTrainer(source, small(UnifiedSFTConfig, tmp_path), **common)
    for trainer in (refl, sft):
        assert isinstance(trainer.model, PeftModel)
        assert_same_outputs(outputs(trainer.model), before)
        assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="holds adapters with r=2, but peft_config has 4"):
        ReFLTrainer(source, len, small(ReFLConfig, tmp_path), peft_config=LoraConfig(r=4, lora_alpha=8), **common)


def small(config, folder):
    sizes = {"image_size": IMAGE_SIZE, "max_completion_length": 4} if config is ReFLConfig else {}
    return config(str(folder), use_cpu=True, report_to="none", **sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "adapters with r=2, but peft_config has 4.*leave peft_config out.*trl-unigrpo merge"),
        ({"lora_alpha": 16}, "adapters with lora_alpha=8, but peft_config has 16"),
    ],
)
def test_other_adapters_than_those_of_the_folder_are_refused(make_trainer, stage_one, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model=stage_one[0], peft_config=LoraConfig(**{"r": 2, "lora_alpha": 8, **changes}))


def test_adapters_that_name_no_base(make_trainer, stage_one):
    config = PeftConfig.from_pretrained(stage_one[0])
    config.base_model_name_or_path = None
    config.save_pretrained(stage_one[0])
    with pytest.raises(ValueError, match=r"don't say what they were trained on.*PeftModel.from_pretrained\(model"):
        make_trainer(model=stage_one[0])


def test_adapters_that_transformers_put_into_a_model_are_refused(make_trainer, stage_one):
    model = load_unified_model(stage_one[0])
    with pytest.raises(ValueError, match=r"The model holds adapters.*PeftModel.from_pretrained\(base"):
        make_trainer(model=model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_merged_model_computes_the_same_and_loads_as_a_plain_one(tmp_path, dtype, tolerance):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, target_modules=BOTH)
    model = get_peft_model(tiny_bagel().to(dtype), config)
    expected, layers = outputs(model), {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            update = module.lora_B["default"].weight @ module.lora_A["default"].weight / 2  # alpha / r
            layers[name] = module.base_layer.weight.detach().clone(), update.detach()
    merged = model.merge_and_unload()
    assert type(merged) is BagelForUnifiedGeneration and len(layers) == 28
    for name, (weight, update) in layers.items():
        # One rounding of the update and one of the sum.
        closed_form, own = weight.float() + update, merged.get_submodule(name).weight
        assert own.dtype == dtype
        spacing = torch.finfo(dtype).eps * (closed_form.abs() + update.abs())
        assert ((own.float() - closed_form).abs() <= 2 * spacing).all()
    assert 0 < difference(outputs(merged), expected) < tolerance
    assert difference(outputs(tiny_bagel().to(dtype)), expected) > 2 * tolerance
    merged.save_pretrained(tmp_path)
    loaded = BagelForUnifiedGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert_same_outputs(outputs(loaded), outputs(merged))


# The base is held once


def copies_of(weight):
    """Count how often the values of a tensor are in memory."""
    gc.collect()  # what earlier tests left
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]  # torch.compile's aside
    alike = [x for x in tensors if x.shape == weight.shape and x.dtype == weight.dtype and torch.equal(x, weight)]
    return len({x.untyped_storage().data_ptr() for x in alike})


@pytest.mark.parametrize(
    ("dtype", "beta", "given"),  # every pair of values once
    [
        (torch.float32, 0.0, False),
        (torch.bfloat16, 0.1, False),
        (torch.float32, 0.1, True),
        (torch.bfloat16, 0.0, True),
    ],
)
def test_reference_of_adapters_shares_the_base(make_trainer, dtype, beta, given):
    model = tiny_bagel(seed=31).to(dtype)  # other tests may have left models of theirs
    base = dict(model.named_parameters())
    weight = base["language_model.model.layers.1.mlp.up_proj.weight"]
    assert copies_of(weight) == 1
    config = LoraConfig(r=2, target_modules=BOTH)
    peft_config, model = (None, get_peft_model(model, config)) if given else (config, model)
    trainer = make_trainer(model=model, peft_config=peft_config, beta=beta, bf16=dtype == torch.bfloat16, max_steps=3)
    trainer.train()
    assert trainer.unified.kept_reference is None
    with trainer.unified.reference() as reference:
        held = {
            name.replace("base_layer.", ""): parameter
            for name, parameter in reference.named_parameters()
            if "lora_" not in name
        }
        assert held.keys() == base.keys()
        assert all(held[name] is base[name] for name in base)
        assert copies_of(weight) == 1


def test_full_fine_tuning_does_keep_a_copy(make_trainer):
    """The counter above sees one where there is one."""
    trainer = make_trainer(model=tiny_bagel(seed=32))
    assert copies_of(trainer.unified.language_model.model.layers[1].mlp.up_proj.weight) == 2
