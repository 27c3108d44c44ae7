"""Both halves in 4 bits: what is quantised, that it trains, and that the adapters are saved as ever."""

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tests.helpers.painting import painted_steps, prompts_alone
from tests.helpers.tiny_painters import PROMPTS, generators
from tests.helpers.tiny_pipelines import FAMILIES, qwen3, tokenizer
from tests.helpers.tiny_unified import moved, weights
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration
from trl_unigrpo.models.pipeline.loading import painter_quantization


bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny = FAMILIES["sd3"]()
    qwen3(language_head=True).save_pretrained(folder / "thinker")
    tokenizer().save_pretrained(folder / "thinker")
    tiny.pipeline.save_pretrained(folder / "painter")
    return {"thinker": str(folder / "thinker"), "painter": str(folder / "painter")}


def quantize_blocks(network):
    """Quantise blocks as diffusers does by a `BitsAndBytesConfig`, which needs a GPU there."""
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks"):
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                quant_type="nf4",
                compute_dtype=module.weight.dtype,
            )
            layer.load_state_dict(module.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, layer.to("cpu"))


@pytest.fixture(params=["float32", "bfloat16"])
def quantized(request, folders):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    dtype = getattr(torch, request.param)
    pipeline = DiffusionPipeline.from_pretrained(folders["painter"], dtype=dtype)
    quantize_blocks(pipeline.transformer)
    return PipelineForUnifiedGeneration.from_pretrained(
        thinker=folders["thinker"],
        painter=pipeline,
        dtype=dtype,
        quantization_config=config,
        painter_arguments={"max_sequence_length": 32},
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers quantises on a GPU alone")
def test_both_are_loaded_in_four_bits(folders):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = PipelineForUnifiedGeneration.from_pretrained(**folders, quantization_config=config)
    assert any("transformer_blocks" in name for name in four_bit(model.painter))


def test_the_painters_configuration_is_that_of_the_thinker():
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    found = painter_quantization(config, torch.bfloat16).quant_mapping["transformer"]
    assert isinstance(found, diffusers.BitsAndBytesConfig)
    assert found.load_in_4bit and found.bnb_4bit_quant_type == "nf4" and found.bnb_4bit_use_double_quant
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    assert set(found.llm_int8_skip_modules) == {"norm_out", "proj_out"}
    of_encoder = painter_quantization(config, torch.bfloat16, thinks=True).quant_mapping["text_encoder"]
    assert isinstance(of_encoder, BitsAndBytesConfig)
    assert of_encoder.load_in_4bit and of_encoder.llm_int8_skip_modules == ["lm_head"]


def four_bit(network):
    return {name for name, module in network.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def test_blocks_are_quantised_and_heads_are_not(quantized):
    assert any("transformer_blocks" in name for name in four_bit(quantized.painter))
    assert any("layers" in name for name in four_bit(quantized.thinker))
    assert not {name for name in four_bit(quantized.thinker) if "lm_head" in name}
    assert not {name for name in four_bit(quantized.painter) if name.startswith(("proj_out", "norm_out"))}
    assert not four_bit(quantized.frozen)


def test_replay_of_a_quantised_painter(quantized):
    plan = RolloutPlan(quantized.own_timesteps(3, (8, 8)), (8, 8), torch.tensor([0, 1]))
    steps = painted_steps(quantized, prompts_alone(PROMPTS), plan, generators())
    for index, velocity in quantized.velocities(steps):
        assert velocity.dtype == steps.x.dtype == torch.float32
        assert torch.equal(velocity, steps.states.velocity[index])


def test_it_trains(make_trainer, quantized, tmp_path):
    trainer = make_trainer(
        model=quantized,
        peft_config=LoraConfig(r=2),
        processing_class=tokenizer(),
        image_size=8,
        max_completion_length=4,
        gradient_checkpointing=True,
        trust_checks="raise" if quantized.thinker.dtype == torch.float32 else "warn",
    )
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    assert {name.split(".")[2] for name in changed} == {"thinker", "painter"}
    assert all(".lora_" in name for name in changed)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    trainer.save_model(tmp_path)
    assert (tmp_path / "adapters" / "painter" / "pytorch_lora_weights.safetensors").is_file()
