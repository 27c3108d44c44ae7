"""An image processor's steps in torch, so that gradients reach the pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import Tensor


_MODES = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}


def processed_size(height: int, width: int, size: Any) -> tuple[int, int]:
    """
    Return what (height, width) become by an image processor's `size`, in pixels.

    Raises:
        ValueError: for a size that is neither {height, width} nor {shortest_edge}.
    """
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    if size.get("shortest_edge") and not size.get("longest_edge"):
        short, long = sorted((height, width))
        new_short, new_long = size["shortest_edge"], int(size["shortest_edge"] * long / short)
        return (new_short, new_long) if height <= width else (new_long, new_short)
    raise ValueError(f"The image processor's size {dict(size)} can't be differentiated: expected height and width, or "
                     "shortest_edge.")  # fmt: skip


def differentiable_pixels(pixels: Tensor, processor: Any) -> Tensor:
    """
    Resize, crop, rescale and normalise as a Hugging Face image processor does, without its rounding to 8 bits.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        processor: an image processor with a fixed size of its output (CLIP's, SigLIP's, LLaVA's, ...).

    Returns:
        (B, 3, H', W'), the model's `pixel_values`, in the dtype of `pixels`.

    Raises:
        ValueError: for a step that has no counterpart here.
    """
    if processor.do_resize:
        if processor.resample not in _MODES:
            raise ValueError(f"resample={processor.resample!r} can't be differentiated: expected BILINEAR or BICUBIC.")
        size = processed_size(pixels.shape[-2], pixels.shape[-1], processor.size)
        for target in (
            (pixels.shape[-2], size[1]),
            size,
        ):  # like Pillow: rows first, and each pass clipped to the range
            if target != tuple(pixels.shape[-2:]):
                pixels = F.interpolate(pixels, target, mode=_MODES[processor.resample], antialias=True).clamp(0, 1)
    if getattr(processor, "do_center_crop", False):
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = ((have - want) // 2 for have, want in zip(pixels.shape[-2:], (height, width), strict=True))
        if min(top, left) < 0:
            raise ValueError(
                f"Images of {pixels.shape[-1]} x {pixels.shape[-2]} pixels are smaller than the image processor's "
                f"crop of {width} x {height}."
            )
        pixels = pixels[..., top : top + height, left : left + width]
    if processor.do_rescale:
        pixels = pixels * (255 * processor.rescale_factor)
    if processor.do_normalize:
        mean, std = (torch.tensor(v).to(pixels)[:, None, None] for v in (processor.image_mean, processor.image_std))
        pixels = (pixels - mean) / std
    return pixels
