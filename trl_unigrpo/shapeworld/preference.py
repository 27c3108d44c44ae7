"""A learned reward: a small model that has seen which of two images people would prefer for a prompt.

It stands where a real training has its learned judge: useful, differentiable and wrong in its own ways. It was trained
on pairs of the base model's own images, as judged by an annotator who errs. So it is right where those images differ,
and nobody knows what it says of images such as the base never paints. `trl-unigrpo build-shapeworld-reward` makes it
again and prints how often it is right.

Shapes: B images, T words, P patches, D the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ..messages import user_text
from .grammar import parse_prompt
from .render import CELL_SIZE, IMAGE_SIZE
from .verifier import images_to_array
from .world import MAX_PROMPT_WORDS, WORDS


PREFERENCE_WEIGHTS = Path(__file__).parent / "preference.safetensors"

PADDING = 0
_WORD_IDS = {word: index for index, word in enumerate(WORDS, PADDING + 1)}


class PreferenceModel(nn.Module):
    """
    A transformer over an image's patches that reads the prompt by cross-attention, with one number as its answer.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads: of the layers over patches; the words have one layer.
        patch_size: pixels; divides 48.
    """

    center: Tensor
    """The mean answer to the base's own images."""

    def __init__(
        self,
        hidden_size: int = 64,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        patch_size: int = CELL_SIZE,
    ):
        super().__init__()
        sizes: dict[str, Any] = {
            "d_model": hidden_size,
            "nhead": num_attention_heads,
            "dim_feedforward": 2 * hidden_size,
            "dropout": 0.0,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.words = nn.Embedding(PADDING + 1 + len(WORDS), hidden_size)
        self.word_positions = nn.Parameter(0.1 * torch.randn(MAX_PROMPT_WORDS, hidden_size))
        self.reader = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 1, enable_nested_tensor=False)
        self.patches = nn.Conv2d(3, hidden_size, patch_size, patch_size)
        self.answer = nn.Parameter(torch.zeros(1, hidden_size))
        self.positions = nn.Parameter(0.5 * torch.randn(1 + (IMAGE_SIZE // patch_size) ** 2, hidden_size))
        layer = nn.TransformerDecoderLayer(**sizes)
        self.viewer = nn.TransformerDecoder(layer, num_hidden_layers, nn.LayerNorm(hidden_size))
        self.head = nn.Linear(hidden_size, 1)
        self.register_buffer("center", torch.zeros(()))

    def forward(self, word_ids_BT: Tensor, pixels_BCHW: Tensor) -> Tensor:
        """
        Say how good images are for their prompts.

        Args:
            word_ids_BT: (B, 12), from `word_ids`.
            pixels_BCHW: (B, 3, 48, 48) in [0, 1].

        Returns:
            (B,) logits a, of Bradley and Terry's model: sigmoid(a_1 - a_2) is the chance that the first of two images
            of a prompt is preferred, and 0 is an average image of the base.
        """
        padding_BT = word_ids_BT == PADDING
        words_BTD = self.reader(self.words(word_ids_BT) + self.word_positions, src_key_padding_mask=padding_BT)
        patches_BPD = self.patches(2 * pixels_BCHW - 1).flatten(2).mT
        answer_B1D = self.answer.expand(len(pixels_BCHW), 1, -1)
        tokens = torch.cat([answer_B1D, patches_BPD], 1) + self.positions
        seen = self.viewer(tokens, words_BTD, memory_key_padding_mask=padding_BT)
        return self.head(seen[:, 0])[:, 0] - self.center


def word_ids(prompts: Sequence[str | list[dict[str, Any]]]) -> Tensor:
    """
    Turn B prompts of the grammar, plain or conversational, into (B, 12) ids of words, padded by 0.

    Raises:
        ValueError: for a prompt that is not of the grammar.
    """
    ids = torch.full((len(prompts), MAX_PROMPT_WORDS), PADDING)
    for row, prompt in enumerate(prompts):
        text = user_text(prompt)
        parse_prompt(text)
        words = [_WORD_IDS[word] for word in text.split()]
        ids[row, : len(words)] = torch.tensor(words)
    return ids


@cache
def load_preference_model(device: torch.device) -> PreferenceModel:
    """Load the model that comes with the package, for use alone; once per process and device."""
    with torch.device("meta"):  # no weights are drawn, so that a training that asks for it goes on as it would
        model = PreferenceModel()
    model.load_state_dict(load_file(PREFERENCE_WEIGHTS), assign=True)
    return model.to(device).eval().requires_grad_(False)


def soft_preference_reward(pixels: Tensor, prompts: Sequence[str | list[dict[str, Any]]], **kwargs: Any) -> Tensor:
    """
    Score images as [`preference_reward`] does, with a gradient to their pixels: a reward for ReFL.

    Args:
        pixels: (B, 3, 48, 48) in [0, 1].
        prompts: B prompts of the grammar, plain or conversational (the last user message counts).

    Returns:
        (B,) in (0, 1), in the dtype of `pixels`.

    Raises:
        ValueError: for pixels of another shape, another number of prompts, or a prompt that is not of the grammar.
    """
    if len(prompts) != len(pixels):
        raise ValueError(f"{len(pixels)} images for {len(prompts)} prompts: expected one image per prompt")
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"pixels have shape {tuple(pixels.shape)}, expected (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}): set "
            f"image_size={IMAGE_SIZE}, the size in which ShapeWorld's shapes are drawn"
        )
    model, ids = load_preference_model(pixels.device), word_ids(prompts).to(pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):
        return model(ids, pixels.float()).sigmoid().to(pixels.dtype)


@torch.no_grad()
def preference_reward(
    prompts: Sequence[str | list[dict[str, Any]]],
    completions: Sequence[Any],
    images: Sequence[Image.Image],
    **kwargs: Any,
) -> list[float]:
    """
    Give the chance that an image would be preferred to an average one of the base, in (0, 1): a TRL reward function.

    It is learned, and wrong now and then: docs/shapeworld.md has how often, and of what.

    Args:
        prompts: B prompts of the grammar, plain or conversational (the last user message counts).
        completions: not read, the image alone is scored.
        images: B images of 48 x 48 pixels, one per completion.
    """
    return soft_preference_reward((torch.from_numpy(images_to_array(images)) + 1) / 2, prompts).tolist()
