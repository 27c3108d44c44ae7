"""A random Qwen2.5-VL with a token for each byte: larger images take more tokens."""

import torch
from torch import nn
from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.helpers.tiny_pipelines import qwen25_vl, tokenizer


MARKERS = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ImagesOnly(Qwen2_5_VLProcessor):
    """Without a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)


def tiny_image_processor():
    """Images of 56 pixels to a side at least: 4 tokens."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})


def tiny_qwen_vl(dtype=torch.float64):
    """The model and its processor."""
    words = tokenizer(2048)
    words.add_tokens([*MARKERS.values(), "<|video_pad|>"], special_tokens=True)
    words.chat_template = TEMPLATE
    model = qwen25_vl().to(dtype)
    for name, token in MARKERS.items():
        setattr(model.config, f"{name}_token_id", words.convert_tokens_to_ids(token))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # far from uniform, and far from blind to the image
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3, generator=generator)
    processor = ImagesOnly(tiny_image_processor(), words, chat_template=TEMPLATE)
    return model.eval(), processor
