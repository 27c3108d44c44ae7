"""
Random tiny pipelines of diffusers, built in memory. A new family is one more entry of `FAMILIES`.

Some put a template before the prompt, which takes a token for each byte here: lengths must leave room for both.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast


VOCABULARY = 300
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class TinyPipeline:
    """A pipeline, the size (height, width) that it paints, further arguments of its call, and what is odd about it."""

    pipeline: Any
    size: tuple[int, int]
    arguments: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def tokenizer(max_length: int = 512, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=max_length,
        padding_side=padding_side,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def saved_halves(folder: Path) -> dict[str, str]:
    """Write a thinker and a painter as a hub would have them; returns both folders."""
    qwen3(language_head=True).save_pretrained(folder / "thinker")
    tokenizer().save_pretrained(folder / "thinker")
    FAMILIES["sd3"]().pipeline.save_pretrained(folder / "painter")
    return {name: str(folder / name) for name in ("thinker", "painter")}


def random_weights(network: nn.Module, std: float = 0.08) -> nn.Module:
    """Every number random: diffusers starts last layers at zero, where nothing depends on anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim < 2 and "norm" in name and "bias" not in name:
                nn.init.ones_(parameter)
            else:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def seeded(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return make(*args, **kwargs).eval()


# Parts


def vae(latent_channels: int, widths: tuple[int, ...] = (8,)) -> nn.Module:
    count = len(widths)
    return seeded(
        diffusers.AutoencoderKL,
        latent_channels=latent_channels,
        block_out_channels=widths,
        norm_num_groups=1,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def video_vae() -> nn.Module:
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.1, 0.9, 1.3, 1.0]}
    sizes = {"base_dim": 24, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1}
    return seeded(diffusers.AutoencoderKLQwenImage, **sizes, temperal_downsample=[False, True], **statistics)


def clip(projection: bool = True, width: int = 32) -> nn.Module:
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=width,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=128,
    )
    return seeded(kind, config)


def t5(multilingual: bool = False) -> nn.Module:
    kind = transformers.UMT5EncoderModel if multilingual else transformers.T5EncoderModel
    config = transformers.UMT5Config if multilingual else transformers.T5Config
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return seeded(kind, config(vocab_size=VOCABULARY, pad_token_id=0, **sizes))


def qwen3(language_head: bool = False, layers: int = 3) -> nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
        tie_word_embeddings=True,
    )
    return seeded(transformers.Qwen3ForCausalLM if language_head else transformers.Qwen3Model, config)


def qwen25_vl(width: int = 16, layers: int = 2) -> nn.Module:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [1, 1, 2] if width == 16 else [2, 2, 4],
        },
        "bos_token_id": 1,
        "eos_token_id": 5,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    markers = {"vision_end_token_id": 5, "vision_start_token_id": 4, "image_token_id": 3, "video_token_id": 2}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **markers)
    return seeded(transformers.Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl(kind: Callable[..., nn.Module]) -> nn.Module:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return seeded(kind, config)


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        head_dim=4,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        sliding_window=64,
        pad_token_id=0,
    )
    return seeded(transformers.Gemma2Model, config)


# Families


def sd3() -> TinyPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=clip(),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(),
    )
    return TinyPipeline(pipeline, (8, 8), {"max_sequence_length": 32})


def flux1() -> TinyPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipeline = diffusers.FluxPipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(1),
        text_encoder=clip(projection=False),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )
    return TinyPipeline(pipeline, (8, 8), {"max_sequence_length": 32})


def flux2_klein() -> TinyPipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = seeded(
        diffusers.AutoencoderKLFlux2,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    autoencoder.bn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    autoencoder.bn.running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 1.5]))
    pipeline = diffusers.Flux2KleinPipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=qwen3(language_head=True),
        tokenizer=tokenizer(),
    )
    return TinyPipeline(pipeline, (8, 8), {"max_sequence_length": 64, "text_encoder_out_layers": (1,)})


def qwen_image() -> TinyPipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    pipeline = diffusers.QwenImagePipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=video_vae(),
        text_encoder=qwen25_vl(),
        tokenizer=tokenizer(1024),
    )
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 512})


def z_image_parts() -> dict[str, Any]:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return {
        "transformer": random_weights(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae(16, (8, 8)),
        "text_encoder": qwen3(),
        "tokenizer": tokenizer(),
    }


def z_image() -> TinyPipeline:
    return TinyPipeline(diffusers.ZImagePipeline(**z_image_parts()), (32, 32), {"max_sequence_length": 96})


def lumina2() -> TinyPipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 32, 32),
        cap_feat_dim=8,
    )
    pipeline = diffusers.Lumina2Pipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, (8, 8, 8, 8)),
        text_encoder=gemma2(),
        tokenizer=tokenizer(),
    )
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 300})


def sana() -> TinyPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    halves = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)),
            "layers_per_block": (1, 1),
        }.items()
    }
    autoencoder = seeded(
        diffusers.AutoencoderDC,
        latent_channels=4,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
        **halves,
    )
    # The scheduler of the released checkpoints.
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = diffusers.SanaPipeline(
        transformer=random_weights(transformer),
        scheduler=scheduler,
        vae=autoencoder,
        text_encoder=gemma2(),
        tokenizer=tokenizer(),
    )
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 64, "complex_human_instruction": None})


def aura_flow() -> TinyPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    pipeline = diffusers.AuraFlowPipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae(4, (8, 8)),
        text_encoder=t5(multilingual=True),
        tokenizer=tokenizer(),
    )
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 64})


def cogview4() -> TinyPipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    config = transformers.GlmConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipeline = diffusers.CogView4Pipeline(
        transformer=random_weights(transformer),
        scheduler=scheduler,
        vae=vae(4, (8, 8)),
        text_encoder=seeded(transformers.GlmModel, config),
        tokenizer=tokenizer(padding_side="left"),
    )
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 64})


def chroma() -> TinyPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    pipeline = diffusers.ChromaPipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(1),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )
    return TinyPipeline(pipeline, (8, 8), {"max_sequence_length": 32})


def ovis_image() -> TinyPipeline:
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.OvisImagePipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(1),
        text_encoder=qwen3(),
        tokenizer=tokenizer(),
    )
    return TinyPipeline(pipeline, (16, 16), {"max_sequence_length": 256})


def hunyuan_image() -> TinyPipeline:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=False,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )
    autoencoder = seeded(
        diffusers.AutoencoderKLHunyuanImage,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        scaling_factor=0.47,
        spatial_compression_ratio=2,
        sample_size=32,
    )
    guiders = {name: diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5) for name in ("guider", "ocr_guider")}
    pipeline = diffusers.HunyuanImagePipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=autoencoder,
        text_encoder=qwen25_vl(32, layers=3),  # the last two are not used
        tokenizer=tokenizer(1024),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        **guiders,
    )
    pipeline.tokenizer_max_length = 192  # instead of 1000: its template and a prompt, byte by byte
    return TinyPipeline(pipeline, (16, 16))


def prx() -> TinyPipeline:
    from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
    from transformers.models.t5gemma import T5GemmaConfig, T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    transformer = PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=8,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[2, 2],
    )
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 256,
        "layer_types": ["full_attention"],
        "dropout_rate": 0.0,
        "query_pre_attn_scalar": 4,
    }
    config = T5GemmaConfig(encoder=T5GemmaModuleConfig(**sizes), is_encoder_decoder=False, **sizes)
    pipeline = diffusers.PRXPipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=seeded(T5GemmaEncoder, config.encoder),
        tokenizer=tokenizer(64),
    )
    return TinyPipeline(pipeline, (16, 16))


def krea2() -> TinyPipeline:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
    )
    pipeline = diffusers.Krea2Pipeline(
        transformer=random_weights(transformer),
        scheduler=scheduler,
        vae=video_vae(),
        text_encoder=qwen3_vl(transformers.Qwen3VLModel),
        tokenizer=tokenizer(1024),
        text_encoder_select_layers=(0, 1, 2),
    )
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 224})


def modular_z_image() -> TinyPipeline:
    from diffusers.modular_pipelines.z_image import ZImageAutoBlocks

    pipeline = ZImageAutoBlocks().init_pipeline()
    pipeline.update_components(**z_image_parts())
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 96})


def flux_kontext() -> TinyPipeline:
    parts = flux1().pipeline.components
    return TinyPipeline(diffusers.FluxKontextPipeline(**parts), (16, 16), {"max_sequence_length": 32})


def flux2_klein_kv() -> TinyPipeline:
    parts = flux2_klein().pipeline.components
    arguments = {"max_sequence_length": 64, "text_encoder_out_layers": (1,)}
    return TinyPipeline(diffusers.Flux2KleinKVPipeline(**parts), (8, 8), arguments)


def bria() -> TinyPipeline:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    pipeline = diffusers.BriaPipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        image_encoder=None,
        feature_extractor=None,
    )
    return TinyPipeline(pipeline, (16, 16), {"max_sequence_length": 48})


def wan_vae(**sizes: Any) -> nn.Module:
    downsample = {"temperal_downsample": [False, True, True], "scale_factor_temporal": 4}
    return seeded(diffusers.AutoencoderKLWan, base_dim=4, num_res_blocks=1, **downsample, **sizes)


def bria_fibo() -> TinyPipeline:
    from diffusers.models.transformers.transformer_bria_fibo import BriaFiboTransformer2DModel

    transformer = BriaFiboTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        text_encoder_dim=32,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    config = transformers.SmolLM3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
    )
    patches = {"z_dim": 16, "decoder_base_dim": 8, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    pipeline = diffusers.BriaFiboPipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=wan_vae(in_channels=12, **patches),
        text_encoder=seeded(transformers.SmolLM3ForCausalLM, config),
        tokenizer=tokenizer(),
    )
    return TinyPipeline(pipeline, (64, 64), {"max_sequence_length": 64})


def prx_pixel() -> TinyPipeline:
    from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel

    transformer = PRXTransformer2DModel(
        patch_size=8,
        in_channels=3,
        context_in_dim=16,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[2, 2],
        bottleneck_size=4,
    )
    pipeline = diffusers.PRXPixelPipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=qwen3(),
        tokenizer=tokenizer(64),
        prompt_max_tokens=64,
    )
    return TinyPipeline(pipeline, (32, 32))


class TextProcessor(transformers.ProcessorMixin):
    """A processor of texts and images of which the texts' part is left."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer, chat_template=CHAT_TEMPLATE)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)


def nucleus() -> TinyPipeline:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=True,
        mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=[1.0, 1.0],
    )
    pipeline = diffusers.NucleusMoEImagePipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=video_vae(),
        text_encoder=qwen3_vl(transformers.Qwen3VLForConditionalGeneration),
        processor=TextProcessor(tokenizer(1024)),
    )
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 512, "return_index": -1})


def wan() -> TinyPipeline:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    # The scheduler of the released checkpoints.
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.1, 0.9, 1.3, 1.0]}
    pipeline = diffusers.WanPipeline(
        transformer=random_weights(transformer),
        scheduler=scheduler,
        vae=wan_vae(z_dim=4, **statistics),
        text_encoder=t5(multilingual=True),
        tokenizer=tokenizer(),
    )
    return TinyPipeline(pipeline, (32, 32), {"max_sequence_length": 64})


def longcat_image() -> TinyPipeline:
    transformer = diffusers.LongCatImageTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.LongCatImagePipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(16),
        text_encoder=qwen25_vl(),
        tokenizer=tokenizer(1024),
        text_processor=TextProcessor(tokenizer(1024)),
    )
    pipeline.tokenizer_max_length = 64
    return TinyPipeline(pipeline, (16, 16))


def hidream() -> TinyPipeline:
    """With an area of its own, and experts whose weights get no gradient where it paints."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    pipeline = diffusers.HiDreamImagePipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, (8, 8, 8, 8)),
        text_encoder=clip(),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(),
        text_encoder_4=seeded(transformers.LlamaForCausalLM, config),
        tokenizer_4=tokenizer(),
    )
    pipeline.default_sample_size = 16
    return TinyPipeline(pipeline, (128, 128), {"max_sequence_length": 32})


FAMILIES: dict[str, Callable[[], TinyPipeline]] = {
    make.__name__: make
    for make in (
        *(sd3, flux1, flux2_klein, qwen_image, z_image, lumina2, sana, aura_flow, cogview4, chroma),
        *(ovis_image, hunyuan_image, prx, krea2, modular_z_image),
        *(flux_kontext, flux2_klein_kv, bria, bria_fibo, prx_pixel, nucleus, wan, longcat_image),
    )
}
