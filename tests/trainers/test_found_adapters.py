"""Painters and thinkers that carry adapters already: what was found is where training starts, and stays."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.tiny_painters import unified
from tests.helpers.tiny_pipelines import sd3
from tests.helpers.tiny_unified import moved, prompts_dataset, weights
from trl_unigrpo.models.adapters import merge_found_adapters
from trl_unigrpo.trainers.refl_trainer import ReFLConfig, ReFLTrainer


ARGUMENTS = {"image_size": 8, "max_completion_length": 4, "beta": 0.1, "alarms": "off"}
STYLE = {"r": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}
IDS = torch.tensor([[10, 40, 90, 41]])


def outputs(model):
    """Logits of a text and a velocity of an image."""
    latents = torch.randn(1, *model.latent_shape((8, 8)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = model.encode_context(["a red cube"])
        return model.thinker(IDS).logits, model.predict_velocity(context, latents, torch.tensor([0.5]), (8, 8))


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def trained_from(make_trainer, model, start, **given):
    """Train, with checks that only new adapters of both parts moved, from this start."""
    trainer = make_trainer(
        model=model, processing_class=model.tokenizer, peft_config=LoraConfig(r=2), **ARGUMENTS, **given
    )
    assert_close(outputs(model), start)
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    assert all(".default." in name for name in changed)
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in changed} == {"thinker", "painter"}
    assert trainer.state.log_history[0]["flow/velocity_mse"] == pytest.approx(0, abs=1e-9)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-7)
    return trainer


@pytest.mark.parametrize("name", ["style", "default"])
def test_style_of_the_painter_stays_and_only_new_adapters_are_trained(make_trainer, name):
    tiny = sd3()
    plain = outputs(unified(tiny))
    tiny.pipeline.transformer.add_adapter(LoraConfig(**STYLE), adapter_name=name)
    model = unified(tiny)
    start = outputs(model)
    assert not torch.equal(start[1], plain[1])
    with pytest.warns(UserWarning, match=f"came with adapters \\('{name}'\\). They are merged into its weights"):
        trained_from(make_trainer, model, start)


def test_style_that_is_switched_off_stays_off(make_trainer):
    tiny = sd3()
    start = outputs(unified(tiny))
    tiny.pipeline.transformer.add_adapter(LoraConfig(**STYLE), adapter_name="style")
    tiny.pipeline.transformer.disable_adapters()
    trained_from(make_trainer, unified(tiny), start)


def test_one_pipeline_used_twice_goes_on_where_it_was(make_trainer):
    tiny = sd3()
    first = unified(tiny)
    trained_from(make_trainer, first, outputs(first), image_learning_rate=0.05)
    second = unified(tiny)
    start = outputs(second)
    assert not torch.equal(start[1], outputs(unified(sd3()))[1])
    trained_from(make_trainer, second, start)


def test_style_saves_beside_what_was_trained(make_trainer, tmp_path):
    """The saved adapters go on top of the painter with its style, by diffusers alone."""
    tiny, other = sd3(), sd3()
    for pipeline in (tiny.pipeline, other.pipeline):
        torch.manual_seed(5)
        pipeline.transformer.add_adapter(LoraConfig(**STYLE), adapter_name="style")
    model = unified(tiny)
    trainer = trained_from(make_trainer, model, outputs(model), image_learning_rate=0.05)
    trainer.save_model(tmp_path)
    other.pipeline.load_lora_weights(tmp_path / "adapters" / "painter", adapter_name="trained")
    other.pipeline.set_adapters(["style", "trained"])
    torch.testing.assert_close(outputs(unified(other))[1], outputs(model)[1], rtol=1e-4, atol=1e-5)


def test_biases_of_parts_that_are_never_trained_stay(make_trainer):
    config = LoraConfig(r=2, bias="all")
    model = unified(sd3())
    make_trainer(model=model, processing_class=model.tokenizer, peft_config=config, **ARGUMENTS)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"thinker", "painter"}
    assert any(name.endswith(".bias") for name in trained)


def test_refl_starts_from_the_style_too(tmp_path):
    tiny = sd3()
    tiny.pipeline.transformer.add_adapter(LoraConfig(**STYLE), adapter_name="style")
    model = unified(tiny)
    start = outputs(model)
    settings = {"report_to": "none", "use_cpu": True, "image_size": 8, "max_completion_length": 4}
    trainer = ReFLTrainer(
        model,
        reward=lambda pixels, prompts, **_: pixels.mean((1, 2, 3)),
        args=ReFLConfig(str(tmp_path), **settings),
        train_dataset=prompts_dataset(),
        processing_class=model.tokenizer,
        peft_config=LoraConfig(r=2),
    )
    assert_close(outputs(model), start)
    assert all(".default." in name for name, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"modules_to_save": ["proj_out"]}], ids=["lora", "dora", "whole module"]
)
def test_merging_changes_nothing_that_is_computed(config):
    model = unified(sd3())
    torch.manual_seed(2)
    targets = model.default_lora_targets("both")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    start, names = outputs(model), set(dict(unified(sd3()).named_parameters()))
    merge_found_adapters(model)
    assert_close(outputs(model), start)
    assert set(dict(model.named_parameters())) == names
    assert not hasattr(model, "peft_config")


def test_model_without_adapters_is_left_alone(recwarn):
    model = unified(sd3())
    before = weights(model)
    merge_found_adapters(model)
    assert not moved(before, weights(model))
    assert not [warning for warning in recwarn if "came with adapters" in str(warning.message)]
