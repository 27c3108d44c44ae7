"""The reference of the regulariser and of the text's KL is where this training starts, whatever is trained."""

import copy
import itertools

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from tests.helpers.tiny_unified import moved, tiny_bagel, weights
from trl_unigrpo.monitoring.trust import TrustError


RATES = {"learning_rate": 0.02, "image_learning_rate": 0.02, "max_steps": 3, "alarms": "off"}
QUERIES = r".*layers\.\d+\.self_attn\.q_proj(_moe_gen)?"  # of one shape, as VeRA asks
BOTH = tiny_bagel().default_lora_targets("both")

ADAPTERS = {
    "LoRA": lambda: LoraConfig(r=2, target_modules=BOTH),
    "LoRA from random": lambda: LoraConfig(r=2, target_modules=BOTH, init_lora_weights=False),
    "PiSSA": lambda: LoraConfig(r=2, target_modules=BOTH, init_lora_weights="pissa"),
    "OLoRA": lambda: LoraConfig(r=2, target_modules=BOTH, init_lora_weights="olora"),
    "DoRA": lambda: LoraConfig(r=2, target_modules=BOTH, use_dora=True),
    "biases": lambda: LoraConfig(r=2, target_modules=BOTH, bias="lora_only"),
    "token rows": lambda: LoraConfig(r=2, target_modules=BOTH, trainable_token_indices=[8, 9, 10]),
    "whole modules": lambda: LoraConfig(r=2, target_modules=BOTH, modules_to_save=["llm2vae"]),
    "LoHa": lambda: LoHaConfig(r=2, target_modules=BOTH),
    "LoKr": lambda: LoKrConfig(r=2, target_modules=BOTH),
    "IA3": lambda: IA3Config(target_modules=BOTH, feedforward_modules=[]),
    "VeRA": lambda: VeraConfig(r=2, target_modules=QUERIES),
}


def adapted(kind, adapter_name="default"):
    """A model that goes on with adapters which were trained before."""
    torch.manual_seed(3)
    model = get_peft_model(tiny_bagel(), ADAPTERS[kind](), adapter_name=adapter_name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def assert_reference_is(start, trainer, seen):
    for batch in seen.batches:
        with torch.no_grad():
            expected = start.predict_velocities(batch["steps"])
        torch.testing.assert_close(batch["reference"], expected, rtol=1e-4, atol=1e-5)
    first, *_, last = [log for log in trainer.state.log_history if "flow/velocity_mse" in log]
    assert first["flow/velocity_mse"] == pytest.approx(0, abs=1e-9)
    assert last["flow/velocity_mse"] > 1e-9
    if trainer.beta:
        assert first["kl"] == pytest.approx(0, abs=1e-7)
        assert last["kl"] > 1e-6


# One of each: adapters that are switched off, weights that an initialisation changes, what lies beside the matrices.
FAST = {("LoRA", False), ("PiSSA", False), ("biases", False), ("whole modules", False), ("token rows", True)}
FAST |= {("LoRA", True), ("DoRA", True), ("VeRA", True)}


@pytest.mark.parametrize(
    ("kind", "goes_on"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in itertools.product(ADAPTERS, (False, True))
    ],
)
def test_reference_of_adapters_is_the_start(make_trainer, train, kind, goes_on):
    given = {"model": adapted(kind)} if goes_on else {"peft_config": ADAPTERS[kind]()}
    trainer = make_trainer(beta=0.1, **given, **RATES)
    start, before = copy.deepcopy(trainer.unified), weights(trainer.model)
    assert (trainer.unified.kept_reference is None) == (kind == "LoRA" and not goes_on)
    seen = train(trainer)
    assert_reference_is(start, trainer, seen)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert moved(before, weights(trainer.model)) <= trained


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_reference_of_full_fine_tuning_is_a_copy_that_stays(make_trainer, train, beta):
    trainer = make_trainer(beta=beta, **RATES)
    seen = train(trainer)
    start = tiny_bagel()
    assert not moved(weights(start), trainer.unified.kept_reference)
    assert_reference_is(start, trainer, seen)


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_second_stage_starts_anew(make_trainer, train, beta, adapter_name):
    model = get_peft_model(tiny_bagel(), ADAPTERS["LoRA"](), adapter_name=adapter_name)
    for stage in (1, 2):
        trainer = make_trainer(model=model, beta=beta, **RATES)
        assert set(model.peft_config) == {adapter_name}
        start = copy.deepcopy(trainer.unified)
        assert (trainer.unified.kept_reference is None) == (stage == 1)
        assert_reference_is(start.eval(), trainer, train(trainer))


def test_reference_of_an_earlier_run_is_not_used_again(make_trainer, train):
    first = make_trainer(**RATES)
    train(first)
    second = make_trainer(model=first.unified, peft_config=LoraConfig(r=2), **RATES)
    start = copy.deepcopy(second.unified)
    assert start.kept_reference is None
    assert_reference_is(start, second, train(second))


def test_no_reference_without_a_regulariser(make_trainer, train):
    trainer = make_trainer(flow_regularizer="none")
    assert trainer.unified.kept_reference is None
    seen = train(trainer)
    assert all("reference" not in batch for batch in seen.batches)
    assert "flow/velocity_mse" not in trainer.state.log_history[1]


def test_text_kl_alone_has_its_reference_too(make_trainer, train):
    trainer = make_trainer(flow_regularizer="none", beta=0.1, **RATES)
    train(trainer)
    logs = trainer.state.log_history
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert logs[2]["kl"] > 1e-6
    assert trainer.args.beta == 0.1


# The check before the first update


@pytest.mark.parametrize(
    ("expert", "regularizer", "message"),
    [
        ("image", "velocity_mse", "regulariser is not 0 before the first update"),
        ("image", "latent_kl", "regulariser is not 0 before the first update"),
        ("text", "none", r"text KL is \S+ before the first update"),
    ],
)
def test_reference_that_is_not_the_start_is_found(make_trainer, expert, regularizer, message):
    trainer = make_trainer(beta=0.1, peft_config=LoraConfig(r=2), flow_regularizer=regularizer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name and trainer.unified.is_image_parameter(name) == (expert == "image"):
                parameter.fill_(0.05)
    with pytest.raises(TrustError, match=message):
        trainer.train()


def test_check_leaves_a_resumed_run_alone(make_trainer, tmp_path):
    settings = {**RATES, "output_dir": tmp_path, "beta": 0.1}
    make_trainer(**settings, peft_config=LoraConfig(r=2), save_strategy="steps", save_steps=2).train()
    again = make_trainer(**settings, peft_config=LoraConfig(r=2))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    [first, *_] = [log for log in again.state.log_history if log.get("step", 0) == 3]
    assert first["flow/velocity_mse"] > 1e-8


# What is refused, and what is said


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_learning_is_refused_by_name(make_trainer, config):
    with pytest.raises(ValueError, match=rf"{config.__name__} is prompt learning.*Use adapters of weights"):
        make_trainer(peft_config=config(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def test_what_is_trained_is_said_by_number_and_part(make_trainer, capsys):
    trainer = make_trainer(peft_config=LoraConfig(r=2, target_modules=["k_proj", "o_proj_moe_gen"]))
    counts = {"text": 0, "image": 0}
    for name, parameter in trainer.model.named_parameters():
        counts["image" if "moe_gen" in name else "text"] += parameter.numel() * parameter.requires_grad
    line = f"Trained: {counts['text']:,} numbers of the text expert (4 tensors), "
    assert line + f"{counts['image']:,} numbers of the image expert (4 tensors)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("adapters", "rate", "weak"),
    [({"r": 32}, 3e-4, True), ({"r": 32, "lora_alpha": 64}, 3e-4, False), ({"r": 32}, 1e-3, False)],
)
def test_weak_adapters_at_the_rates_of_a_single_gpu_are_questioned(make_trainer, recwarn, adapters, rate, weak):
    make_trainer(peft_config=LoraConfig(**adapters), image_learning_rate=rate)
    found = [str(warning.message) for warning in recwarn if "lora_alpha=8 with r=32" in str(warning.message)]
    assert len(found) == weak
    assert all("pass LoraConfig(r=32, lora_alpha=64)" in message for message in found)
