"""What is saved, read back by transformers and diffusers alone: the same thinking, and the same picture to the bit."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
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


def saved_parts(tmp_path):
    """Folders of a thinker and a painter, as a hub would have them."""
    tiny = FAMILIES["sd3"]()
    qwen3(language_head=True).save_pretrained(tmp_path / "thinker")
    tokenizer().save_pretrained(tmp_path / "thinker")
    tiny.pipeline.save_pretrained(tmp_path / "painter")
    arguments = {"painter_arguments": tiny.arguments, "dtype": torch.float32}
    return {"thinker": str(tmp_path / "thinker"), "painter": str(tmp_path / "painter"), **arguments}


def adapted(model, **config):
    torch.manual_seed(2)
    targets = model.default_lora_targets("both")
    return get_peft_model(
        model, LoraConfig(**{"r": 2, "target_modules": targets, "init_lora_weights": False, **config})
    )


CONFIGS = {
    "alpha": {"lora_alpha": 3},
    "patterns": {"rank_pattern": {"attn.to_q": 3, "q_proj": 1}, "alpha_pattern": {"attn.to_k": 5}},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_are_read_by_their_own_libraries(tmp_path, kind):
    parts = saved_parts(tmp_path)
    model = PipelineForUnifiedGeneration.from_pretrained(**parts)
    plain = painted(model), model.generate(IDS, max_new_tokens=8, do_sample=False)
    adapted(model, **CONFIGS[kind])
    images, tokens = painted(model), model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert not equal(images, plain[0])
    assert not torch.equal(tokens, plain[1])
    model.save_adapters(tmp_path)

    pipeline = DiffusionPipeline.from_pretrained(parts["painter"])
    pipeline.load_lora_weights(tmp_path / "adapters" / "painter")
    assert equal(stock(pipeline, max_sequence_length=32, guidance_scale=1.0), images)
    thinker = AutoModelForCausalLM.from_pretrained(parts["thinker"], dtype=torch.float32)
    thinker = PeftModel.from_pretrained(thinker, tmp_path / "adapters" / "thinker")
    assert torch.equal(thinker.generate(input_ids=IDS, max_new_tokens=8, do_sample=False), tokens)


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
    code = model.quick_start(str(tmp_path / "run"), PAINTING).split("```")[1].removeprefix("python")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["image"].size == (8, 8)
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
