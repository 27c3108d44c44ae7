"""A random tiny Cosmos3: diffusers' pipeline, and the language model that transformers makes of the same weights."""

import functools
from typing import ClassVar

import diffusers
import torch
import transformers

from tests.helpers.tiny_pipelines import VOCABULARY, tokenizer
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig


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


def parts(kind=Cosmos3):
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
    pipeline = kind(network, words, vae, scheduler, enable_safety_checker=False)
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


def tiny_cosmos3(kind=Cosmos3) -> PipelineForUnifiedGeneration:
    arguments = {"use_system_prompt": False, "add_resolution_template": False}
    return PipelineForUnifiedGeneration(*parts(kind), PipelineUnifiedConfig(painter_arguments=arguments))
