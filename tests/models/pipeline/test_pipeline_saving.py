"""Saved models, read back by transformers and diffusers alone: the same thinking, and the same image to the bit."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers.painting import prompts_alone
from tests.helpers.tiny_painters import PROMPTS, generators, tiny_model
from tests.helpers.tiny_pipelines import FAMILIES, qwen3, tokenizer
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models import load_unified_model
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration
from trl_unigrpo.models.registry import model_skeleton
from trl_unigrpo.sampling import decode, paint


STEPS = 3
PAINTING = {"image_size": 8, "num_inference_steps": STEPS, "max_completion_length": 4}
IDS = torch.tensor([[10, 40, 90, 41]])


def painted(model, size=(8, 8)):
    plan = RolloutPlan(model.own_timesteps(STEPS, size), size)
    return decode(model, paint(model, prompts_alone(PROMPTS[:2]), plan, generators(2)))


def stock(pipeline, size=(8, 8), **arguments):
    call = {"height": size[0], "width": size[1], "num_inference_steps": STEPS, "generator": generators(2)}
    return pipeline(prompt=PROMPTS[:2], **call, **arguments).images


def equal(images, others):
    return all(np.array_equal(a, b) for a, b in zip(images, others, strict=True))


def difference(images, others):
    """The largest, of 255."""
    pairs = zip(images, others, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def saved_parts(tmp_path, tied=True):
    """Folders of a thinker and a painter, as a hub would have them."""
    tiny = FAMILIES["sd3"]()
    thinker = qwen3(language_head=True)
    if not tied:
        thinker.config.tie_word_embeddings = False
        thinker.lm_head.weight = torch.nn.Parameter(2 * thinker.lm_head.weight.detach())
    thinker.save_pretrained(tmp_path / "thinker")
    tokenizer().save_pretrained(tmp_path / "thinker")
    tiny.pipeline.save_pretrained(tmp_path / "painter")
    arguments = {"painter_arguments": tiny.arguments, "dtype": torch.float32}
    return {"thinker": str(tmp_path / "thinker"), "painter": str(tmp_path / "painter"), **arguments}


def with_adapters(model, config, adapter_name="default"):
    """Adapters, and whatever else they train, as after a training."""
    torch.manual_seed(2)
    model = get_peft_model(model, config, adapter_name=adapter_name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(model, adapter_name="default", **config):
    targets = model.default_lora_targets("both")
    return with_adapters(model, LoraConfig(**{"r": 2, "target_modules": targets, **config}), adapter_name)


CONFIGS = {
    "alpha": {"lora_alpha": 3},
    "patterns": {"rank_pattern": {"attn.to_q": 3, "q_proj": 1}, "alpha_pattern": {"attn.to_k": 5}},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "biases": {"bias": "lora_only"},
    "dropout": {"lora_dropout": 0.5},
    "whole modules": {"modules_to_save": ["lm_head", "proj_out"]},
    "token rows": {"trainable_token_indices": {"thinker.model.embed_tokens": [10, 40]}},
    "another name": {"adapter_name": "mine"},
}


def loaded_by_their_libraries(parts, folder):
    """The thinker of transformers and the pipeline of diffusers, with the adapters of a folder."""
    pipeline = DiffusionPipeline.from_pretrained(parts["painter"])
    if (folder / "painter" / "pytorch_lora_weights.safetensors").exists():
        pipeline.load_lora_weights(folder / "painter")
    else:
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, folder / "painter").get_base_model()
    thinker = AutoModelForCausalLM.from_pretrained(parts["thinker"], dtype=torch.float32)
    return PeftModel.from_pretrained(thinker, folder / "thinker"), pipeline


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_are_read_by_their_own_libraries(tmp_path, kind, recwarn):
    parts = saved_parts(tmp_path, tied=kind != "token rows")
    model = PipelineForUnifiedGeneration.from_pretrained(**parts)
    plain = painted(model), model.thinker(IDS).logits
    adapted(model, **CONFIGS[kind]).eval()
    images, logits = painted(model), model.thinker(IDS).logits
    assert not equal(images, plain[0])
    assert not torch.equal(logits, plain[1])
    model.save_adapters(tmp_path)
    assert not [warning for warning in recwarn if "trained weights" in str(warning.message)]

    thinker, pipeline = loaded_by_their_libraries(parts, tmp_path / "adapters")
    assert equal(stock(pipeline, max_sequence_length=32, guidance_scale=1.0), images)
    assert torch.equal(thinker(input_ids=IDS).logits, logits)


OTHERS = {
    "pissa": (LoraConfig(r=2, init_lora_weights="pissa"), "init_lora_weights='pissa' may have changed"),
    "tied token rows": (LoraConfig(r=2, **CONFIGS["token rows"]), "PEFT would tie the thinker's head to them"),
    "loha": (LoHaConfig(r=2), "LoHaConfig is not LoRA"),
    "adalora": (AdaLoraConfig(init_r=2, total_step=9), "AdaLoraConfig is not LoRA"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_that_others_would_read_wrongly_are_not_exported_but_named(tmp_path, kind, monkeypatch):
    parts = saved_parts(tmp_path)
    model = PipelineForUnifiedGeneration.from_pretrained(**parts)
    config, reason = OTHERS[kind]
    config.target_modules = model.default_lora_targets("both")
    with_adapters(model, config).eval().save_pretrained(tmp_path / "run")
    images, logits = painted(model), model.thinker(IDS).logits
    with pytest.warns(UserWarning, match=rf"No adapters/ .*{reason}.*PEFT's own file.*has all that is trained"):
        model.save_adapters(tmp_path / "run")
    assert [file.name for file in (tmp_path / "run" / "adapters").iterdir()] == ["config.json"]  # of both halves
    # PEFT's own file is whole, and the model card reads that one.
    lines = (
        model.quick_start(str(tmp_path / "run"), PAINTING)
        .split("```")[1]
        .removeprefix("python")
        .split("messages = ")[0]
    )
    model.tokenizer.save_pretrained(tmp_path / "run")
    names = {}
    exec(lines, names)
    torch.testing.assert_close(names["thinker"].float()(IDS).logits, logits)
    assert equal(stock(names["pipeline"], max_sequence_length=32, guidance_scale=1.0), images)


def test_trained_weights_that_are_in_no_part_s_file_are_named(tmp_path):
    model = tiny_model()
    adapted(model)
    model.frozen["vae"].decoder.conv_out.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match="leaves out 1 trained weights, such as 'frozen.vae.decoder.conv_out.bias'"):
        model.save_adapters(tmp_path)


def test_adapters_of_a_pipeline_that_loads_none_are_a_folder_of_peft(tmp_path):
    pytest.importorskip("ftfy")
    model = tiny_model("prx")
    adapted(model)
    images = painted(model, (16, 16))
    model.save_adapters(tmp_path)
    pipeline = FAMILIES["prx"]().pipeline
    wrapped = PeftModel.from_pretrained(pipeline.transformer, tmp_path / "adapters" / "painter")
    pipeline.transformer = wrapped.get_base_model()
    assert equal(stock(pipeline, (16, 16), guidance_scale=1.0, use_resolution_binning=False), images)


def test_a_whole_model_is_two_folders_of_their_own_libraries(tmp_path):
    model = PipelineForUnifiedGeneration.from_pretrained(**saved_parts(tmp_path))
    with torch.no_grad():
        for parameter in (*model.painter.parameters(), *model.thinker.parameters()):
            parameter.add_(0.01)
    images, tokens = painted(model), model.generate(IDS, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path / "whole")

    skeleton = model_skeleton(str(tmp_path / "whole"))
    assert [name for name, _ in skeleton.named_modules()] == [name for name, _ in model.named_modules()]
    again = load_unified_model(str(tmp_path / "whole"), dtype=torch.float32)
    assert equal(painted(again), images)
    assert torch.equal(again.generate(IDS, max_new_tokens=8, do_sample=False), tokens)
    for name in ("painter_prompt", "painter_arguments", "system_prompt", "shared_encoder", "sources"):
        assert getattr(again.config, name) == getattr(model.config, name)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole" / "painter")
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert equal(stock(pipeline, max_sequence_length=32, guidance_scale=1.0), images)
    thinker = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", subfolder="thinker", dtype=torch.float32)
    assert torch.equal(thinker.generate(IDS, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_model_cards_example_runs(tmp_path, adapters, monkeypatch):
    model = PipelineForUnifiedGeneration.from_pretrained(**saved_parts(tmp_path))
    model.tokenizer.save_pretrained(tmp_path / "run")
    if adapters:
        adapted(model).save_pretrained(tmp_path / "run")
        model.save_adapters(tmp_path / "run")
    else:
        model.save_pretrained(tmp_path / "run")
    code = (
        model.quick_start(str(tmp_path / "run"), {**PAINTING, "image_size": [8, 16]})
        .split("```")[1]
        .removeprefix("python")
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["image"].size == (16, 8)
    assert names["tokens"].shape[1] - names["inputs"]["input_ids"].shape[1] <= PAINTING["max_completion_length"]
    own, read = (dict(network.named_modules()) for network in (model.painter, names["pipeline"].transformer))
    assert own.keys() == {name.replace("default_0", "default") for name in read}
    assert type(names["thinker"]).__name__ == ("PeftModelForCausalLM" if adapters else "Qwen3ForCausalLM")
    assert (tmp_path / "image.png").is_file()


def test_the_example_of_a_model_on_the_hub_runs(tmp_path, monkeypatch):
    model = PipelineForUnifiedGeneration.from_pretrained(**saved_parts(tmp_path))
    repository = tmp_path / "hub" / "models--org--run"
    model.save_pretrained(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(model.quick_start("org/run", PAINTING).split("```")[1].removeprefix("python"), names)
    assert names["image"].size == (8, 8) and names["home"] == str(repository / "snapshots" / ("0" * 40))


def test_a_trainer_saves_adapters_for_other_libraries(tmp_path):
    """Beside PEFT's file of both, from which training is resumed."""
    model = tiny_model()
    adapted(model).save_pretrained(tmp_path)
    model.save_adapters(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "adapters" / "painter" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "adapters" / "thinker" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", ["flux2_klein", "z_image"])
def test_the_example_of_a_painter_that_thinks(tmp_path, family, monkeypatch):
    """Its adapters are the text encoder's, too."""
    tiny = FAMILIES[family]()
    tiny.pipeline.save_pretrained(tmp_path / "painter")
    model = PipelineForUnifiedGeneration.from_pretrained(
        painter=str(tmp_path / "painter"), painter_arguments=tiny.arguments, dtype=torch.float32
    )
    adapted(model).save_pretrained(tmp_path / "run")
    model.save_adapters(tmp_path / "run")
    model.tokenizer.save_pretrained(tmp_path / "run")
    lines = (
        model.quick_start(str(tmp_path / "run"), PAINTING)
        .split("```")[1]
        .removeprefix("python")
        .split("messages = ")[0]
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(lines, names)
    tokens = names["thinker"].generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, model.generate(IDS, max_new_tokens=8, do_sample=False))
    arguments = {name: value for name, value in model.painter_arguments.items() if name not in ("height", "width")}
    images = stock(names["pipeline"], tiny.size, **arguments)
    plain = stock(FAMILIES[family]().pipeline, tiny.size, **arguments)
    assert difference(images, plain) > 1
    # Convolutions may round differently where a copy of the VAE's weights lies in memory.
    assert difference(images, painted(model, tiny.size)) <= 1
