"""The eyes of a thinker that reads images: a tower of the Qwen-VL kind, whose images are grids of patches.

Shapes: B images, T text tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, PreTrainedModel

from ..patching import attributes


IMAGE_MARKERS = ("vision_start_token_id", "image_token_id", "vision_end_token_id")

# What the mixin is mixed into; a base class in the eyes of the type checker alone.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class PipelineEyes(_Base):
    """Mixin of a pipeline with a thinker: a text is read back as the thinker's answer to an image."""

    @cached_property
    def image_processor(self) -> Any:
        """
        The thinker's own image processor: out of the pipeline, or the folder that the tokenizer came from; None if
        there is none, or the thinker reads no images. It can be set.
        """
        if self._markers() is None:
            return None
        for part in self.pipeline.components.values():
            found = getattr(part, "image_processor", part)
            if hasattr(found, "merge_size"):
                return found
        try:
            found = AutoImageProcessor.from_pretrained(self.tokenizer.name_or_path)
        except (OSError, ValueError):
            return None
        return found if hasattr(found, "merge_size") else None

    def read_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Keep the pixels (height, width, 3), bytes: the tower reads them where a text is read back."""
        self._check_eyes()
        return [torch.from_numpy(np.array(image.convert("RGB"))) for image in images]

    def read_back(self, images: Sequence[Tensor], texts: Sequence[Sequence[int]]) -> list[Tensor]:
        self._check_eyes()
        if not texts:
            return []
        seen = self.image_processor(images=[Image.fromarray(image.numpy()) for image in images], return_tensors="pt")
        merged = self.image_processor.merge_size**2
        before, placeholder, after = self._turns()
        rows = [
            torch.tensor([*before, *[placeholder] * (int(grid.prod()) // merged), *after, *text])
            for grid, text in zip(seen["image_grid_thw"], texts, strict=True)
        ]
        ids = pad_sequence(rows, batch_first=True).to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        base = self.thinker.base_model
        with attributes(base, rope_deltas=None):  # it keeps those of its last images, for texts that it goes on with
            hidden = base(
                input_ids=ids,
                attention_mask=mask.long(),
                mm_token_type_ids=(mask & (ids == placeholder)).long(),
                pixel_values=seen["pixel_values"].to(self.device, base.dtype),
                image_grid_thw=seen["image_grid_thw"].to(self.device),
                use_cache=False,
            ).last_hidden_state
        ends, counts = [len(row) for row in rows], [len(text) for text in texts]
        scored = [row[end - count - 1 : end - 1] for row, end, count in zip(hidden, ends, counts, strict=True)]
        targets = torch.tensor([token for text in texts for token in text], device=self.device)
        logits = self.get_output_embeddings()(torch.cat(scored))
        log_probs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return list(log_probs.split(counts))

    def _turns(self) -> tuple[list[int], int, list[int]]:
        """Give the tokens before an image of the user's turn, the one that stands for it, and those behind it."""
        markers = self._markers()
        assert markers is not None
        shown = "".join(self.tokenizer.convert_ids_to_tokens(markers))
        turn = [{"role": "user", "content": shown}]
        ids = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        at = ids.index(markers[1])
        return ids[:at], markers[1], ids[at + 1 :]

    def _markers(self) -> list[int] | None:
        """Give the tokens around and for an image; None for a thinker of another kind."""
        config = self.thinker.config
        if not all(hasattr(config, name) for name in (*IMAGE_MARKERS, "vision_config")):
            return None
        return [getattr(config, name) for name in IMAGE_MARKERS]

    def _check_eyes(self) -> None:
        """Raise ValueError, with the remedy, if the thinker reads no images."""
        name = type(self.thinker).__name__
        if self._markers() is None:
            raise ValueError(
                f"{name}, the thinker, reads no images, so that nothing can be read back from them. Take one of the "
                "Qwen-VL kind, such as thinker='Qwen/Qwen2.5-VL-7B-Instruct', or another model to read: "
                "ReadBackReward('Qwen/Qwen3-VL-8B-Instruct')."
            )
        if getattr(self.thinker.base_model, "visual", None) is None:
            raise ValueError(
                f"{name}, the thinker, was loaded without its vision tower, so that it reads no images. Pass the "
                "whole model: thinker=AutoModelForImageTextToText.from_pretrained(...)."
            )
        if self.image_processor is None:
            raise ValueError(
                f"{name}, the thinker, reads images, but nothing here knows how to prepare them: neither the pipeline "
                "nor the tokenizer's folder has its image processor. Set model.image_processor = "
                "AutoImageProcessor.from_pretrained('Qwen/Qwen2.5-VL-7B-Instruct'), or that of its family."
            )
