"""Cosmos3: transformers has its reasoning tower, diffusers both; here they are one network."""

import copy

import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from peft import LoraConfig, PeftModel, get_peft_model

from tests.helpers.tiny_cosmos3 import parts, tiny_cosmos3
from tests.helpers.tiny_painters import PROMPTS, generators, painted_from
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration


SIZE = (16, 16)
IDS = torch.tensor([[10, 40, 90, 41, 7, 200]])


@pytest.fixture
def model():
    return tiny_cosmos3()


def tower_logits(network):
    """The reasoning tower's, run by diffusers' own code."""
    positions = torch.arange(IDS.shape[1]).expand(3, -1)
    hidden = network.embed_tokens(IDS[0])
    cos, sin = (x.squeeze(0) for x in network.rotary_emb(positions.unsqueeze(1), hidden.device, hidden.dtype))
    text, _ = network._run_decoder_stack(hidden, torch.zeros(1, 32), (cos, sin, cos[:1], sin[:1]))
    return network.lm_head(text)


def records_of(model, steps=(0, 1)):
    plan = RolloutPlan(model.own_timesteps(4, SIZE), SIZE, torch.tensor(steps))
    return model.rollout(painted_from(PROMPTS[:2]), plan, generators(2))


def adapted(model, experts):
    torch.manual_seed(1)
    targets = model.default_lora_targets(experts)
    get_peft_model(model, LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_both_towers_are_held_once(model):
    language = model.thinker.model.language_model
    assert [name for name, _ in language.named_parameters() if "norm" not in name] == []
    own = {id(p) for p in model.painter.parameters()}
    assert all(id(p) in own for p in language.parameters())
    visual = sum(p.numel() for p in model.thinker.model.visual.parameters())
    painter = sum(p.numel() for p in model.painter.parameters())
    frozen = sum(p.numel() for p in model.frozen.parameters())
    assert sum(p.numel() for p in model.parameters()) == visual + painter + frozen
    torch.testing.assert_close(model(IDS).logits[0], tower_logits(model.painter), rtol=0, atol=0)


def test_one_adapter_serves_both(model):
    plain = model(IDS).logits
    weights = adapted(model, "text")
    assert len(weights) == 2 * 2 * 7
    assert not any(model.is_image_parameter(name) for name in weights)
    logits = model(IDS).logits
    assert (logits - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits[0], tower_logits(model.painter), rtol=0, atol=0)
    with model.reference() as reference:
        torch.testing.assert_close(reference(IDS).logits, plain, rtol=0, atol=0)
    ids = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model(ids).logits[0, 5:-1].argmax(-1), ids[0, 6:])


def test_images_expert_is_the_other_tower(model):
    weights = adapted(model, "image")
    assert weights and all(model.is_image_parameter(name) for name in weights)
    assert {name.split(".")[4] for name in weights} >= {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    torch.testing.assert_close(model(IDS).logits[0], tower_logits(model.painter), rtol=0, atol=0)


def test_what_was_sampled_is_computed_again_one_image_at_a_time(model):
    adapted(model, "both")
    assert not model._runner.batches
    records = records_of(model)
    assert not torch.equal(records[0].latents, records[1].latents)
    for k, velocity in model.velocities(records):
        assert torch.equal(velocity, torch.stack([record.velocities[k] for record in records]))
        velocity.square().mean().backward()
    reached = {name.split(".")[4] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"to_k", "to_v", "add_q_proj"} <= reached  # through the keys and values of the text, too
    images = model.decode_latents(torch.stack([record.final_latents for record in records]), SIZE)
    assert [image.size for image in images] == [SIZE, SIZE]
    pixels = model.decode_latents(torch.stack([record.final_latents for record in records]), SIZE, "pt")
    assert pixels.shape == (2, 3, *SIZE)


def test_the_safety_check_stays_on(model):
    """For every prompt the first time, and for every image; not for the steps between."""
    checks = model.pipeline.checks
    checks.clear()
    records = records_of(model)
    of_painting = list(checks)
    assert of_painting.count(True) >= 2
    checks.clear()
    list(model.velocities(records))
    assert checks == [True, True, False, False]
    checks.clear()
    model.decode_latents(torch.stack([record.final_latents for record in records]), SIZE)
    assert checks == [True, True]


def test_a_copy_is_whole(model):
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.painter.layers[0].self_attn.to_q.weight.add_(1.0)
    assert (clone(IDS).logits - model(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(clone(IDS).logits[0], tower_logits(clone.painter), rtol=0, atol=0)


def test_adapters_are_read_by_both_libraries(model, tmp_path):
    adapted(model, "both")
    model.save_adapters(tmp_path)
    thinker, _, pipeline = parts()
    plain = thinker(IDS).logits
    thinker = PeftModel.from_pretrained(thinker, tmp_path / "adapters" / "thinker")
    assert torch.equal(thinker(IDS).logits, model(IDS).logits)
    assert not torch.equal(thinker(IDS).logits, plain)
    wrapped = PeftModel.from_pretrained(pipeline.transformer, tmp_path / "adapters" / "painter")
    pipeline.transformer = wrapped.get_base_model()
    torch.testing.assert_close(tower_logits(pipeline.transformer), model(IDS).logits[0], rtol=0, atol=0)
    call = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 2, "output_type": "latent"}
    call |= {"use_system_prompt": False, "add_resolution_template": False, "guidance_scale": 1.0}
    painted = [p(PROMPTS[0], generator=generators(1)[0], **call).video for p in (pipeline, model.pipeline)]
    assert torch.equal(*painted)


def test_a_saved_model_holds_both_towers_once_again(tmp_path):
    model = tiny_cosmos3(Cosmos3OmniPipeline)
    model.save_pretrained(tmp_path)
    again = PipelineForUnifiedGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again._shared == model._shared
    assert model._shared
