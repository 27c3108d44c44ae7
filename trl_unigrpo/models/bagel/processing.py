"""BAGEL's inputs: prompts in its own format, and images in the sizes that its two encoders take."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...images import checked_rgb
from ..tokenizer import read_tokenizer
from .configuration import (
    SPECIAL_TOKENS,
    THINK_ANSWER_SYSTEM_PROMPT,
    THINK_SYSTEM_PROMPT,
    BagelConfig,
)


THINK_PROMPTS = {"image": THINK_SYSTEM_PROMPT, "answer": THINK_ANSWER_SYSTEM_PROMPT}
"""The system prompts that ask for a thinking, by what is to follow it."""


@dataclass(frozen=True)
class ResizeRule:
    """
    The sizes, in pixels, that an encoder was trained on; the aspect ratio is kept up to the stride.

    Attributes:
        longest: the longer side is at most this; a multiple of the stride.
        shortest: the shorter side is at least this, up to the stride, unless the longer one would get too long.
        stride: both sides are multiples of this.
        max_pixels: limit on height times width.
    """

    longest: int
    shortest: int
    stride: int
    max_pixels: int = 1_806_336

    def __post_init__(self) -> None:
        if self.longest % self.stride:
            raise ValueError(f"longest={self.longest} must be a multiple of stride={self.stride}.")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """
        Return the (height, width) that an image of this height and width is resized to.

        Sides are brought into their range, where the shorter one has the last word. Above `max_pixels` both sides are
        multiplied by the ratio of the *areas*: the released rule goes further down than the limit asks. Last, a longer
        side that is still too long is brought to its limit. Each step rounds to the stride.
        """
        scale = max(min(self.longest / max(height, width), 1.0), self.shortest / min(height, width))
        height, width = self._scaled(height, width, scale)
        if height * width > self.max_pixels:
            height, width = self._scaled(height, width, self.max_pixels / (height * width))
        if max(height, width) > self.longest:
            height, width = self._scaled(height, width, self.longest / max(height, width))
        return height, width

    def _scaled(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """
        Multiply both sides by `scale`, rounded to whole pixels and then to the stride, of which each is at least one.
        """
        height, width = (
            max(self.stride, round(round(side * scale) / self.stride) * self.stride) for side in (height, width)
        )
        return height, width


def vae_rule(config: BagelConfig) -> ResizeRule:
    """Give the sizes of images for the VAE."""
    longest = config.pixels_per_token * config.max_latent_size
    return ResizeRule(longest, longest // 2, config.pixels_per_token)


def vit_rule(config: BagelConfig) -> ResizeRule | None:
    """Give the sizes of images for the understanding tower; None where the configuration has none."""
    if config.vit_config is None:
        return None
    patch = config.vit_config.patch_size
    longest = patch * config.vit_max_num_patch_per_side
    return ResizeRule(longest, min(224, longest), patch)


class BagelProcessor:
    """
    The way from prompts to token ids and from PIL images to pixels, as the released model was trained to see them.

    Example:

    ```python
    processor = BagelProcessor.from_pretrained("ByteDance-Seed/BAGEL-7B-MoT")
    ids = processor.prompt_ids("A red cube on a blue table.", think="image")
    features = model.embed_vit_image(processor.vit_pixels(image))
    ```

    Args:
        tokenizer: that of the checkpoint.
        config: that of the checkpoint, from which the sizes of images follow. The released one has sides of 512 to
            1024 pixels in steps of 16 for the VAE, of 224 to 980 in steps of 14 for the understanding tower.

    Attributes:
        vae_rule (`ResizeRule`): sizes of images for the VAE.
        vit_rule (`ResizeRule` or None): those for the understanding tower, if the configuration has one.

    Raises:
        ValueError: if the tokenizer is not the one of this configuration.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: BagelConfig):
        check_tokenizer(tokenizer, config)
        self.tokenizer = tokenizer
        self.config = config
        self.vae_rule, self.vit_rule = vae_rule(config), vit_rule(config)

    @classmethod
    def from_pretrained(cls, source: str | Any, **kwargs: Any) -> "BagelProcessor":
        """Read configuration and tokenizer from the folder or hub id of a checkpoint; no weights."""
        config = BagelConfig.from_pretrained(source, **kwargs)
        return cls(read_tokenizer(source, **kwargs), config)

    # Text

    def wrap(self, text: str) -> list[int]:
        """Tokenize one chunk: `<|im_start|>`, the text, `<|im_end|>`; no role, no line break."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [self.config.im_start_token_id, *ids, self.config.im_end_token_id]

    def prompt_ids(self, prompt: str, think: str | None = None) -> list[int]:
        """
        Tokenize a prompt, after the system prompt that asks for a thinking.

        Args:
            think: "image" for a thinking before an image, "answer" for one before an answer in words, None for none.
        """
        if think is not None and think not in THINK_PROMPTS:
            raise ValueError(f"think={think!r}: expected one of {sorted(THINK_PROMPTS)}, or None.")
        system = [] if think is None else self.wrap(THINK_PROMPTS[think])
        return system + self.wrap(prompt)

    # Images

    def vae_image(self, image: Image.Image) -> Image.Image:
        """Convert the image to RGB, in a size that the VAE takes."""
        return resized(checked_rgb(image), self.vae_rule)

    def vae_pixels(self, image: Image.Image) -> Tensor:
        """Return pixels (3, height, width) in [-1, 1] for `encode_images`."""
        return to_pixels(self.vae_image(image))

    def vit_pixels(self, image: Image.Image) -> Tensor:
        """
        Return pixels (3, height, width) in [-1, 1] for `embed_vit_image`.

        As in the released inference code, the tower sees the image that the VAE would, resized once more: a small
        image is enlarged first.
        """
        if self.vit_rule is None:
            raise ValueError("This model has no understanding tower (vit_config is None), so it can't read images.")
        return to_pixels(resized(self.vae_image(image), self.vit_rule))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: BagelConfig) -> None:
    """Raise ValueError if a tokenizer has more tokens than the model, or the marks around a text elsewhere."""
    size = config.llm_config.vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {size}. Take both from the same checkpoint."
        )
    for name in ("im_start_token_id", "im_end_token_id"):
        token, expected = SPECIAL_TOKENS[name], getattr(config, name)
        found = tokenizer.get_vocab().get(token)
        if found != expected:
            raise ValueError(
                f"The tokenizer has {token} at {found}, the model at {expected} ({name}). Take both from the same "
                "checkpoint, and check that its `tokenizer.json` and `tokenizer_config.json` are there."
            )


def resized(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """Resize the image as the rule says, by antialiased bicubic interpolation."""
    height, width = rule.size(image.height, image.width)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> Tensor:
    """Return pixels (3, height, width) in [-1, 1] of an RGB image."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return values.float() / 255 * 2 - 1
