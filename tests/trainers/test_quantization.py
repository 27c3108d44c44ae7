"""4-bit weights under adapters: what is quantised, that they train, and that they come back from disk."""

import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from tests.helpers.adapters import BOTH, assert_same_outputs, difference, outputs
from tests.helpers.paths import FIXTURES, ROOT
from tests.helpers.tiny_unified import (
    moved,
    prompts_dataset,
    redness,
    tiny_bagel,
    tiny_config,
    tiny_tokenizer,
    weights,
)
from trl_unigrpo.cli.train import main
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.models.quantization import ready_to_quantize
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


RELEASED = FIXTURES / "bagel" / "tiny_bagel"


def nf4(**changes):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **changes)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved model with its tokenizer; sizes are multiples of 64, as bitsandbytes' kernels want them."""
    path = tmp_path_factory.mktemp("model")
    tiny_bagel(hidden_size=64, intermediate_size=128).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def load(folder):
    """Function that loads the model in 4 bits."""

    def quantized(dtype=torch.float32, **changes):
        return BagelForUnifiedGeneration.from_pretrained(folder, dtype=dtype, quantization_config=nf4(**changes))

    return quantized


def stored(model):
    """A copy of all that a model without adapters would save, the scales of quantised weights included."""
    return {name: x.clone() for name, x in model.state_dict().items() if "lora_" not in name}


def quantized(model):
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def linear(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# Loading


@pytest.mark.parametrize("double", [False, True])
def test_released_folder_loads_with_the_decoder_in_4_bits(double):
    config = nf4(bnb_4bit_use_double_quant=double)
    model = BagelForUnifiedGeneration.from_pretrained(RELEASED, quantization_config=config)
    plain = BagelForUnifiedGeneration.from_pretrained(RELEASED)
    decoder = {name for name in linear(plain) if name.startswith("language_model.model.layers.")}
    assert len(decoder) == 4 * 14
    assert quantized(model) == decoder
    heads = {"language_model.lm_head", "vae2llm", "llm2vae", "time_embedder.mlp.0", "time_embedder.mlp.2"}
    tower = {name for name in linear(plain) if name.startswith(("vit_model", "connector"))}
    assert heads | tower <= linear(model) - decoder
    assert len(tower) > 2
    for name in heads:
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)
    weight = model.language_model.model.layers[0].mlp_moe_gen.up_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 192 // 2)
    assert weight.quant_state.nested is double
    assert config.llm_int8_skip_modules is None  # the user's own object is left as it was


def test_quantised_loading_is_as_strict(tmp_path):
    folder = Path(shutil.copytree(RELEASED, tmp_path / "bagel", copy_function=shutil.copyfile))
    config = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"28 missing: language_model\.model\.layers\.4\."):
        BagelForUnifiedGeneration.from_pretrained(folder, quantization_config=nf4())


def test_exclusions_of_the_user_come_on_top(load):
    model = load(llm_int8_skip_modules=["language_model.model.layers.1"])
    assert all(".layers.0." in name for name in quantized(model))
    assert len(quantized(model)) == 14


@pytest.mark.parametrize(
    ("dtype", "own", "computed"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        ("bfloat16", None, torch.bfloat16),
        ("auto", None, torch.float32),
        (None, None, torch.float32),
        (torch.bfloat16, torch.float16, torch.float16),
    ],
)
def test_layers_compute_in_the_dtype_of_the_rest(dtype, own, computed):
    ready = ready_to_quantize(nf4(bnb_4bit_compute_dtype=own), ["lm_head"], dtype)
    assert ready.bnb_4bit_compute_dtype == computed
    as_dictionary = ready_to_quantize(nf4(bnb_4bit_compute_dtype=own).to_dict(), ["lm_head"], dtype)
    assert as_dictionary.to_dict() == ready.to_dict()
    assert as_dictionary.llm_int8_skip_modules == ["lm_head"]


def test_bfloat16_model_computes_in_bfloat16(load):
    layer = load(torch.bfloat16).language_model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == layer.weight.quant_state.dtype == torch.bfloat16


# Refused before any weight is read


def build(folder, tmp_path, **arguments):
    return UniGRPOTrainer(
        model=str(folder),
        reward_funcs=redness,
        args=tiny_config(tmp_path / "run", **arguments.pop("config", {})),
        train_dataset=prompts_dataset(),
        **arguments,
    )


@pytest.fixture
def empty(folder, tmp_path):
    """A copy of the folder with weights that nothing can read."""
    copied = Path(shutil.copytree(folder, tmp_path / "empty"))
    for file in copied.glob("*.safetensors"):
        file.write_bytes(b"no weights")
    return copied


@pytest.mark.parametrize("through", ["argument", "model_init_kwargs"])
def test_missing_bitsandbytes_is_one_clear_error(empty, tmp_path, monkeypatch, through):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python marks what can't be imported
    assert importlib.util.find_spec("bitsandbytes") is None
    arguments = {"quantization_config": nf4()}
    if through == "model_init_kwargs":
        arguments = {"config": {"model_init_kwargs": {"quantization_config": nf4().to_dict()}}}
    with pytest.raises(ImportError, match=r"pip install 'trl-unigrpo\[quant\]'"):
        build(empty, tmp_path, peft_config=LoraConfig(r=2), **arguments)


def test_quantised_weights_without_adapters_are_refused(empty, tmp_path):
    with pytest.raises(ValueError, match=r"without peft_config.*--use_peft"):
        build(empty, tmp_path, quantization_config=nf4())


# Training


@pytest.mark.parametrize("double", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_goes_on_after_an_evaluation(folder, tmp_path, train, double):
    trainer = build(
        folder,
        tmp_path,
        quantization_config=nf4(bnb_4bit_use_double_quant=double),
        peft_config=LoraConfig(r=2),
        eval_dataset=prompts_dataset(copies=1),
        config={"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 4},
    )
    assert len(quantized(trainer.model)) == 2 * 14
    base = stored(trainer.model)
    assert any("quant_state" in name for name in base) and any("absmax" in name for name in base)
    seen = train(trainer)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 1, 2, 3, 4]
    assert len(seen.gradients) == 4
    for gradients in seen.gradients:
        assert len(gradients) == 2 * 14 * 2 and all("lora_" in name for name in gradients)
        reached = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
        for experts in ([n for n in gradients if "moe_gen" in n], [n for n in gradients if "moe_gen" not in n]):
            # A has a gradient as soon as B has left zero.
            assert {name for name in experts if "lora_B" in name} <= reached
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert not moved(base, stored(trainer.model))


def test_trainer_takes_a_model_as_bitsandbytes_leaves_it(make_trainer, load):
    model = load()
    for name in quantized(model):
        model.get_submodule(name).support_avx512bf16_for_cpu = True  # what it is on processors that can repack
    trainer = make_trainer(
        model=model, peft_config=LoraConfig(r=2), eval_dataset=prompts_dataset(copies=1), eval_on_start=True
    )
    base = stored(trainer.model)
    trainer.train()
    assert not moved(base, stored(trainer.model))
    assert not any(trainer.model.get_submodule(name).support_avx512bf16_for_cpu for name in quantized(trainer.model))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapter_of_the_user_keeps_every_bit(make_trainer, load, beta):
    torch.manual_seed(0)
    model = get_peft_model(load(), LoraConfig(r=2, init_lora_weights=False, target_modules=BOTH))
    before = weights(model)
    assert {x.dtype for name, x in before.items() if "lora_" in name} == {torch.float32}
    trainer = make_trainer(model=model, beta=beta)
    after = weights(trainer.model)
    assert after.keys() == before.keys()
    assert not moved(before, after)
    reference = trainer.unified.kept_reference
    assert len(reference) == 28 * 2
    assert all(torch.equal(x, before[f"base_model.model.{name}"]) for name, x in reference.items())


def test_8_bit_adam_steps_each_expert_at_its_own_rate(make_trainer, load, train):
    config = LoraConfig(r=64, init_lora_weights=False, target_modules=BOTH)
    rates = {"text": 1e-3, "image": 5e-3}
    trainer = make_trainer(
        model=load(),
        peft_config=config,
        optim="adamw_8bit",
        learning_rate=rates["text"],
        image_learning_rate=rates["image"],
        max_grad_norm=0.0,
        max_steps=1,
    )
    seen = train(trainer)
    assert seen.rates == [rates]
    after, states = weights(trainer.model), trainer.optimizer.state
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            # Adam's first step is the rate times the sign of the gradient.
            rate = rates["image" if "moe_gen" in name else "text"]
            expected = seen.weights[0][name] - rate * seen.gradients[0][name].sign()
            clear = seen.gradients[0][name].abs() > 1e-7
            torch.testing.assert_close(after[name][clear], expected[clear], rtol=0, atol=1e-3 * rate)
            if parameter.numel() >= 4096:  # smaller ones keep a state in float32
                assert states[parameter]["state1"].dtype == states[parameter]["state2"].dtype == torch.uint8


def test_quantised_run_with_8_bit_adam_resumes_exactly(folder, tmp_path):
    def run(name, resume=None):
        settings = {"output_dir": tmp_path / name, "optim": "adamw_8bit", "max_steps": 4}
        trainer = UniGRPOTrainer(
            model=str(folder),
            reward_funcs=redness,
            args=tiny_config(**settings, save_strategy="steps", save_steps=2),
            train_dataset=prompts_dataset(),
            quantization_config=nf4(),
            peft_config=LoraConfig(r=64),
        )
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    whole = run("whole")
    assert not moved(whole, run("resumed", str(tmp_path / "whole" / "checkpoint-2")))


# From disk and into the base


def test_adapter_on_a_quantised_base_comes_back_bit_for_bit(folder, load, tmp_path):
    trainer = build(
        folder, tmp_path, quantization_config=nf4(), peft_config=LoraConfig(r=2), config={"learning_rate": 0.1}
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    expected, base = outputs(trainer.model), load()
    assert difference(outputs(base), expected) > 1e-3
    assert_same_outputs(outputs(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)


def test_quantised_model_comes_back_bit_for_bit_and_trains(load, tmp_path, make_trainer):
    model = load(bnb_4bit_use_double_quant=True)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = BagelForUnifiedGeneration.from_pretrained(tmp_path / "saved")
    assert quantized(loaded) == quantized(model)
    assert_same_outputs(outputs(loaded), expected)
    trainer = make_trainer(model=loaded, peft_config=LoraConfig(r=2))
    before = weights(trainer.model)
    trainer.train()
    assert moved(before, weights(trainer.model))


def test_merged_quantised_model_is_as_near_as_quantising_again(load, folder, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, target_modules=BOTH)
    model = get_peft_model(load(), config)
    expected, unmerged = outputs(model), outputs(load())
    full = BagelForUnifiedGeneration.from_pretrained(folder)
    rounding = difference(unmerged, outputs(full))  # what quantising once costs
    with pytest.warns(UserWarning, match="rounding errors"):
        merged = model.merge_and_unload()
    assert len(quantized(merged)) == 28
    assert difference(outputs(merged), expected) < 2 * rounding < difference(unmerged, expected)
    merged.save_pretrained(tmp_path)
    assert_same_outputs(outputs(BagelForUnifiedGeneration.from_pretrained(tmp_path)), outputs(merged))


# From the command line

OPTIONS = {
    "use_cpu": True,
    "report_to": "none",
    "max_steps": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 5,
    "image_size": 8,
    "num_inference_steps": 6,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "lora_r": 2,
    "optim": "adamw_8bit",
}


def arguments(**own):
    return [text for name, value in {**OPTIONS, **own}.items() for text in (f"--{name}", str(value))]


def assert_quantised_run(adapter, folder):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, BOTH)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=nf4())
    assert len(quantized(model)) == 28
    plain = BagelForUnifiedGeneration.from_pretrained(folder, quantization_config=nf4())
    assert difference(outputs(model), outputs(plain)) > 0


def test_train_command_in_4_bits(folder, tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na red cat\na small tree\n")
    own = {"model_name_or_path": folder, "dataset_name": prompts, "output_dir": tmp_path / "run"}
    main(arguments(**own, use_peft=True, reward_funcs="tests.helpers.tiny_unified:redness"))
    assert_quantised_run(tmp_path / "run", folder)


def test_train_command_refuses_4_bits_without_adapters(folder, tmp_path):
    own = {"model_name_or_path": folder, "dataset_name": "shapeworld", "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match="--use_peft"):
        main(arguments(**own, reward_funcs="tests.helpers.tiny_unified:redness"))


def test_example_in_4_bits(folder, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na red cat\na small tree\n")
    own = {"model_name_or_path": folder, "prompts": prompts, "output_dir": tmp_path / "run"}
    monkeypatch.setattr(sys, "argv", ["unigrpo_bagel.py", *arguments(**own)])
    runpy.run_path(str(ROOT / "examples" / "unigrpo_bagel.py"), run_name="__main__")
    assert_quantised_run(tmp_path / "run", folder)
