"""Tiny random models of the CLIP family and a Mask2Former, in memory, and images for them."""

import string

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SwinConfig,
)


START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_LENGTH = 24
SIDE = 16
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def tokenizer() -> CLIPTokenizer:
    """Letters, one token each. As in CLIP, the end has the highest id and pads."""
    letters = [*string.ascii_lowercase, *string.digits, "-"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=TEXT_LENGTH)


def spread_weights(model: torch.nn.Module, std: float = 0.5, seed: int = 2) -> torch.nn.Module:
    """Weights large enough for every output to depend on every input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("class_embedding"):
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def text_sizes(words: CLIPTokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(words),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def tiny_clip() -> tuple[CLIPModel, CLIPProcessor]:
    words = tokenizer()
    config = CLIPConfig(
        text_config={**LAYERS, **text_sizes(words), "hidden_act": "gelu"},
        vision_config={**LAYERS, "image_size": SIDE, "patch_size": 4, "hidden_act": "gelu"},
        projection_dim=24,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return spread_weights(CLIPModel(config)), CLIPProcessor(image_processor=images, tokenizer=words)


def tiny_siglip() -> tuple[SiglipModel, SiglipProcessor]:
    words = tokenizer()
    config = SiglipConfig(
        text_config={**LAYERS, **text_sizes(words)},
        vision_config={**LAYERS, "image_size": SIDE, "patch_size": 4},
    )
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model = spread_weights(SiglipModel(config))
    model.logit_scale.data.fill_(1.2)
    model.logit_bias.data.fill_(-0.7)
    return model, SiglipProcessor(image_processor=images, tokenizer=words)


def tiny_mask2former() -> tuple[Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil]:
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={0: "dog", 1: "mouse", 2: "person"},
        label2id={"dog": 0, "mouse": 1, "person": 2},
    )
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    return model, Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})


def smooth_image(seed: int, width: int, height: int) -> Image.Image:
    """Slow waves of colour, one set for each seed."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-1, 1, (3, 3))]
    return Image.fromarray(np.uint8(np.round(127.5 + 110 * np.stack(waves, axis=-1))))


def word_image(word: str, size: tuple[int, int] = (256, 128), font_size: int = 56) -> Image.Image:
    image = Image.new("RGB", size, "white")
    font = ImageFont.load_default(size=font_size)
    ImageDraw.Draw(image).text((size[0] / 2, size[1] / 2), word, fill="black", font=font, anchor="mm")
    return image
