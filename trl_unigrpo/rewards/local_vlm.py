"""An image-text-to-text model in this process: its weights, its turns, its batches and its inputs."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image
from torch import Tensor

from .common import Seen, images_of
from .own_device import OwnDevice
from .pixels import differentiable_pixels


class LocalVLM(OwnDevice):
    """
    Base of what asks a vision-language model in this process.

    Args:
        model: folder or hub id of an image-text-to-text model, or the model itself. Its weights are frozen.
        processor: needed with a model that is no name.
        dtype: of the weights, as "bfloat16" or `torch.bfloat16`; "auto" for the checkpoint's.
        device: where it computes; by default its process' own GPU if there is one.
        batch_size: images at once; where the memory runs out, half as many from then on.
        max_side: larger images are scaled down to so many pixels before the model's own processor; None for never.
        offload: keep the weights in the CPU's memory between uses.

    Raises:
        ValueError: if an argument is wrong, or the model reads no images.
    """

    last_error = ""

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        batch_size: int = 8,
        max_side: int | None = 768,
        offload: bool = True,
    ):
        for argument, value in (("batch_size", batch_size), ("max_side", max_side)):
            if value is not None and value < 1:
                raise ValueError(f"{argument}={value}: expected at least 1.")
        if isinstance(model, str):
            model, processor = load_vlm(model, processor, dtype)
        elif processor is None:
            raise ValueError("processor is missing: pass the model's processor with the model, or the model's name.")
        elif dtype != "auto":
            model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if not hasattr(processor, "image_processor"):
            raise ValueError(
                f"{type(model).__name__} with a {type(processor).__name__} reads no images: expected an "
                "image-text-to-text model with its processor."
            )
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.wanted_device = device
        self.batch_size, self.max_side, self.offload = batch_size, max_side, offload
        self._turn = threading.Lock()

    def release(self) -> None:
        """Move the weights back to the CPU, with `offload=True`."""
        if self.offload and self.device.type != "cpu":
            self.model.to("cpu")
            torch.cuda.empty_cache()

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Have the weights where they compute; one at a time."""
        with self._turn:
            self.placed()
            try:
                yield
            finally:
                self.release()

    def in_batches(self, count: int, work: Callable[[slice], list[Any]]) -> list[Any]:
        """
        Work on images, `batch_size` at once, and join what comes out; where the memory runs out, half as many from
        then on, and None, with the reason in `last_error`, for an image that does not fit alone.
        """
        done: list[Any] = []
        while len(done) < count:
            size = min(self.batch_size, count - len(done))
            try:
                done += work(slice(len(done), len(done) + size))
                continue
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
                    raise
                if size == 1:
                    self.last_error = f"{error} Lower max_side={self.max_side}, or take a smaller model."
                    done.append(None)
                self.batch_size = max(1, size // 2)
            clear_device_cache(garbage_collection=True)  # not before the error, which holds the tensors, is gone
        return done

    def tokenized(self, conversations: Sequence[list[dict[str, Any]]]) -> Any:
        """
        Prepare the model's inputs, padded on the right: positions are then those of a row alone. What the assistant
        says stays open, the user's turn is closed.
        """
        answered = conversations[0][-1]["role"] == "assistant"
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=not answered,
            continue_final_message=answered,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        return inputs.to(self.device, self.model.dtype)

    def see(self, inputs: Any, pixels: Tensor) -> Any:
        """
        Put pixels (B, 3, H, W) in [0, 1], with their gradient, in the place of what the processor made of the images.

        Raises:
            ValueError: if the image processor does more than resize, crop, rescale and normalise.
        """
        seen = differentiable_pixels(pixels, self.processor.image_processor)
        expected = inputs["pixel_values"].shape
        if seen.shape != expected:
            raise ValueError(
                f"The model reads pixels of shape {tuple(expected)}, not {tuple(seen.shape)}: its image processor "
                f"({type(self.processor.image_processor).__name__}) cuts images into pieces: no gradient through that."
            )
        inputs["pixel_values"] = seen.to(self.device, self.model.dtype)
        return inputs


def load_vlm(name: str, processor: Any, dtype: str | torch.dtype) -> tuple[Any, Any]:
    """
    Load an image-text-to-text model, and its processor unless there is one.

    Raises:
        ValueError: for a model of another kind.
    """
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    try:
        kind = type(AutoConfig.from_pretrained(name))
        found = kind.model_type if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else ""
    except ValueError as error:  # the classes of unified models may be registered, or not
        found = str(error).partition(". ")[0]
    if found:
        raise ValueError(
            f"{name!r} is no image-text-to-text model of transformers ({found}): expected one such as "
            "'Qwen/Qwen3-VL-8B-Instruct'. A unified model reads its own images where it is trained: "
            "ReadBackReward('self')."
        )
    processor = processor or AutoProcessor.from_pretrained(name)
    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype), processor


def conversation(shown: Seen, text: str, system_prompt: str, answer: str | None = None) -> list[dict[str, Any]]:
    """Write messages: the images and the text, if any, as the user's turn, and the assistant's answer, if any."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images_of(shown)]
    if text:
        content.append({"type": "text", "text": text})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def to_image(pixels: Tensor) -> Image.Image:
    """Turn pixels (3, H, W) in [0, 1] into an image of 8 bits."""
    rows = (pixels.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(rows.cpu().numpy())
