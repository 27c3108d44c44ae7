"""Embeddings of images and texts by a CLIP or SigLIP model of transformers, with or without gradients.

Shapes: B images or texts, D numbers of an embedding, H x W pixels.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from ..common import to_rgb
from ..own_device import OwnDevice


_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ClipEmbedder(OwnDevice):
    """
    A frozen model of the CLIP family and its processor.

    Args:
        model: id or folder of a model with `get_image_features` and `get_text_features`, or the model itself, which is
            then moved, cast and frozen.
        processor: its processor; loaded from `model` if that is an id or a folder.
        device: its process' own GPU if there is one, by default.
        dtype: of the weights.
        batch_size: images or texts at once.

    Raises:
        ValueError: if `model` is a model without its processor, or has not both kinds of embeddings.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        processor: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        if processor is None and not isinstance(model, str):
            raise ValueError("Got a model without its processor: pass `processor`, or the model's id or folder.")
        self.processor = AutoProcessor.from_pretrained(model) if processor is None else processor
        name = model if isinstance(model, str) else type(model).__name__
        loaded = AutoModel.from_pretrained(model) if isinstance(model, str) else model
        if not (hasattr(loaded, "get_image_features") and hasattr(loaded, "get_text_features")):
            raise ValueError(f"{name} is a {type(loaded).__name__}: expected a CLIP or SigLIP model.")
        self.wanted_device = device
        self.model = loaded.to(dtype).eval().requires_grad_(False)
        self.dtype, self.batch_size = dtype, batch_size
        self.max_length: int = self.model.config.text_config.max_position_embeddings
        self._warned = False

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed images as (B, D) of length 1, at least float32, as the image processor prepares them."""
        rows = []
        for start in range(0, len(images), self.batch_size):
            chunk = [to_rgb(image) for image in images[start : start + self.batch_size]]
            pixels = self.processor.image_processor(chunk, return_tensors="pt")["pixel_values"]
            rows.append(self._image_features(pixels))
        return torch.cat(rows)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """
        Embed texts as (B, D) of length 1, at least float32. The end of a text that is longer than the model reads is
        cut off.
        """
        self._warn_of_long(texts)
        rows = []
        for start in range(0, len(texts), self.batch_size):
            # SigLIP was trained on padded texts and without a mask. CLIP is causal and reads at the text's end, so
            # that it sees no padding.
            ids = self.processor.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding="max_length",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )["input_ids"]
            features = self.placed().get_text_features(input_ids=ids.to(self.device)).pooler_output
            rows.append(F.normalize(at_least_float32(features), dim=-1))
        return torch.cat(rows)

    def pixels(self, pixels: Tensor) -> Tensor:
        """Embed pixels (B, 3, H, W) in [0, 1] as (B, D) of length 1, at least float32; differentiable."""
        return self._image_features(prepare_pixels(pixels.to(self.device), self.processor.image_processor))

    def _image_features(self, pixels: Tensor) -> Tensor:
        features = self.placed().get_image_features(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return F.normalize(at_least_float32(features), dim=-1)

    def _warn_of_long(self, texts: Sequence[str]) -> None:
        if self._warned:
            return
        lengths = [len(ids) for ids in self.processor.tokenizer(list(texts), verbose=False)["input_ids"]]
        if max(lengths, default=0) > self.max_length:
            self._warned = True
            warnings.warn(
                f"A prompt of {max(lengths)} tokens is longer than the {self.max_length} that "
                f"{type(self.model).__name__} reads: the rest does not count. This is said once."
            )


def prepare_pixels(pixels: Tensor, processor: Any) -> Tensor:
    """
    Prepare a tensor as an image processor would, with gradients: resize with antialiasing, crop the centre, normalise.

    It differs from the processor by the latter's rounding to 8 bits.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        processor: an image processor of transformers that resizes by bilinear or bicubic interpolation.

    Returns:
        (B, 3, h, w), as the model takes it.

    Raises:
        ValueError: for another shape or interpolation, or images smaller than the crop.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"Got pixels of shape {tuple(pixels.shape)}, expected (B, 3, H, W).")
    pixels = at_least_float32(pixels)
    if processor.do_resize:
        if processor.resample not in _MODES:
            raise ValueError(
                f"The image processor has resample={processor.resample}: expected 2 (bilinear) or 3 (bicubic)."
            )
        size = resized_shape(pixels.shape[-2:], processor.size)
        pixels = F.interpolate(pixels, size=size, mode=_MODES[processor.resample], antialias=True)
        pixels = pixels.clamp(0, 1)  # bicubic interpolation overshoots
    if getattr(processor, "do_center_crop", None):
        pixels = center_crop(pixels, processor.crop_size["height"], processor.crop_size["width"])
    if processor.do_normalize:
        mean, std = (pixels.new_tensor(x).view(1, -1, 1, 1) for x in (processor.image_mean, processor.image_std))
        pixels = (pixels - mean) / std
    return pixels


def resized_shape(shape: Sequence[int], size: Any) -> tuple[int, int]:
    """Return (height, width) of an image of this shape once resized to a processor's `size`."""
    size = {key: value for key, value in dict(size).items() if value is not None}
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) != {"shortest_edge"}:
        raise ValueError(f"The image processor resizes to {size}: expected height and width, or shortest_edge.")
    height, width = shape
    short = size["shortest_edge"]
    return (short, short * width // height) if height <= width else (short * height // width, short)


def center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Cut out the middle `height` x `width` of pixels (B, C, H, W)."""
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    if top < 0 or left < 0:
        raise ValueError(
            f"Images of {pixels.shape[-2]} x {pixels.shape[-1]} pixels are smaller than the crop, {height} x {width}."
        )
    return pixels[..., top : top + height, left : left + width]
