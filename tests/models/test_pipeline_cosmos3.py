"""Cosmos3: transformers has its reasoning tower, diffusers both; here they are one network."""

import copy
import functools
from typing import ClassVar

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_painters import PROMPTS, generators, painted_from
from tiny_pipelines import VOCABULARY, tokenizer

from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig
from trl_unigrpo.rollout import RolloutPlan


SIZE = (16, 16)
IDS = torch.tensor([[10, 40, 90, 41, 7, 200]])
# transformers' names of what a block of the reasoning tower has, and diffusers'.
NAMES = {
    **{f"self_attn.{a}": f"self_attn.{b}" for a, b in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"))},
    **{
        f"self_attn.{a}": f"self_attn.{b}"
        for a, b in (("o_proj", "to_out"), ("q_norm", "norm_q"), ("k_norm", "norm_k"))
    },
    **{name: name for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
    **{name: name for name in ("input_layernorm", "post_attention_layernorm")},
}


class Cosmos3(diffusers.Cosmos3OmniPipeline):
    """Keeps what its calls are told of the safety check."""

    checks: ClassVar[list[bool]] = []

    @functools.wraps(diffusers.Cosmos3OmniPipeline.__call__)
    def __call__(self, *args, enable_safety_check=True, **kwargs):
        self.checks.append(enable_safety_check)
        return super().__call__(*args, enable_safety_check=enable_safety_check, **kwargs)


def parts():
    """A pipeline and the language model that the same checkpoint is to transformers, with a copy of the weights."""
    torch.manual_seed(0)
    network = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=48,
        latent_channel=16,
        latent_patch_size=1,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=16,
        rope_axes_dim=[4, 2, 2],
        vocab_size=VOCABULARY,
        rope_theta=5e6,
    ).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name and parameter.ndim == 1 else 0.0)
    words = tokenizer(1024)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|vision_start|>"]})
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipeline = Cosmos3(network, words, vae, scheduler, enable_safety_checker=False)
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
        "eos_token_id": 5,
    }
    vision = {"model_type": "qwen3_vl_vision", "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Cosmos3OmniConfig(
        text_config=text, vision_config={**vision, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    )
    thinker = transformers.Cosmos3OmniForConditionalGeneration(config).eval()
    language = thinker.model.language_model
    pairs = [(language.embed_tokens, network.embed_tokens), (language.norm, network.norm)]
    pairs += [(thinker.lm_head, network.lm_head)]
    for own, other in zip(language.layers, network.layers, strict=True):
        pairs += [(own.get_submodule(a), other.get_submodule(b)) for a, b in NAMES.items()]
    for own, other in pairs:
        own.load_state_dict(other.state_dict())
    return thinker, words, pipeline


@pytest.fixture
def model():
    arguments = {"use_system_prompt": False, "add_resolution_template": False}
    return PipelineForUnifiedGeneration(*parts(), PipelineUnifiedConfig(painter_arguments=arguments))


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
