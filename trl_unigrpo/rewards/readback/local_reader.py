"""An image-text-to-text model in this process as the reader."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..common import to_rgb
from ..local_vlm import LocalVLM, conversation, to_image
from .reading import Reading, cut, spelled


class Target(NamedTuple):
    """A text as the end of a conversation: T tokens, and what each of them stands for."""

    ids: list[int]
    pieces: list[str]


class Prepared(NamedTuple):
    """Those texts that can be read: their places among all, their tokens, where these end, and the model's inputs."""

    places: list[int]
    targets: list[Target]
    ends: list[int]
    inputs: Any


class LocalReader(LocalVLM):
    """
    Reads by an image-text-to-text model of transformers: the image is the user's turn, the text what the assistant
    says. A [`Reader`], and differentiable in the pixels.

    ```python
    reader = LocalReader("Qwen/Qwen3-VL-8B-Instruct", dtype="bfloat16")
    trainer = UniGRPOTrainer(model, reward_funcs=ReadBackReward(reader), ...)
    ```

    Args:
        model, processor, dtype, device, batch_size, max_side, offload: see [`LocalVLM`].
        instruction: what the user says beside the image; "" for nothing.
        system_prompt: "" for none.

    Raises:
        ValueError: if an argument is wrong, or the model reads no images.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        instruction: str = "",
        system_prompt: str = "",
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        batch_size: int = 8,
        max_side: int | None = 768,
        offload: bool = True,
    ):
        super().__init__(
            model,
            processor,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            max_side=max_side,
            offload=offload,
        )
        self.instruction, self.system_prompt = instruction, system_prompt

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Reading | None]:
        texts = [text.strip() for text in texts]
        with self.loaded():
            return self.in_batches(len(texts), lambda part: self._readings(images[part], texts[part]))

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """
        Compute the score of each image, see [`Reading.score`], with a gradient to its pixels.

        The weights stay on the device, for the backward pass: call [`release`] after it.

        Args:
            pixels: (B, 3, H, W) in [0, 1].
            prompts: B texts.

        Returns:
            (B,) in (-inf, 0], NaN where a prompt can't be read.

        Raises:
            ValueError: if there is not one prompt per image, or the model's image processor does more than resize,
                crop, rescale and normalise.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != len(prompts):
            raise ValueError(
                f"Got pixels of shape {tuple(pixels.shape)} and {len(prompts)} prompts: expected (B, 3, H, W) and "
                "as many prompts."
            )
        self.placed()
        images = [to_image(image) for image in pixels.detach()]
        ready = self._prepared(images, [prompt.strip() for prompt in prompts])
        scores = [pixels.new_tensor(torch.nan)] * len(pixels)
        if ready is not None:
            self.see(ready.inputs, pixels[ready.places])
            for place, row in zip(ready.places, self._log_probs(ready), strict=True):
                scores[place] = (row[1:] if len(row) > 1 else row).mean().to(pixels)
        return torch.stack(scores)

    def _readings(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Reading | None]:
        readings: list[Reading | None] = [None] * len(texts)
        ready = self._prepared([to_rgb(image, self.max_side) for image in images], texts)
        if ready is None:
            return readings
        for place, target, row in zip(ready.places, ready.targets, self._log_probs(ready), strict=True):
            if row.isfinite().all():
                readings[place] = Reading(target.pieces, row.tolist())
            else:
                self.last_error = f"The model reads NaN in {self.model.dtype}: try another dtype."
        return readings

    def _prepared(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Prepared | None:
        """Prepare those texts that can be read; None, with the reason, if none can."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
        found = {place: target for place, text in enumerate(texts) if (target := self._target(images[place], text))}
        while found:
            rows = [(images[place], self.instruction, self.system_prompt, texts[place]) for place in found]
            inputs = self.tokenized([conversation(*row) for row in rows])
            lengths = inputs["attention_mask"].sum(1).tolist()
            fitting = [length <= limit for length in lengths]
            if all(fitting):
                real = [ids[:length] for ids, length in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
                ends = [self._end(ids, target) for ids, target in zip(real, found.values(), strict=True)]
                return Prepared(list(found), list(found.values()), ends, inputs)
            self.last_error = (
                f"An image and a prompt of {max(lengths)} tokens do not fit into the reader's context of {limit}. "
                f"Lower max_side={self.max_side}, or leave such prompts out."
            )
            found = {place: found[place] for place, fits in zip(found, fitting, strict=True) if fits}
        return None

    def _end(self, ids: list[int], target: Target) -> int:
        """Find the end of a text among the tokens of its conversation, behind which a processor may close it."""
        end = len(ids)
        while end and ids[end - 1] in self._special:
            end -= 1
        if ids[max(0, end - len(target.ids)) : end] != target.ids:
            raise ValueError(
                f"{type(self.processor).__name__} ends a conversation otherwise than its chat template: expected that "
                "what the assistant says comes last."
            )
        return end

    def _target(self, image: Image.Image, text: str) -> Target | None:
        """Find the tokens of a text where the assistant says it; None, with the reason, if it can't be read."""
        if not text:
            self.last_error = "A prompt is empty."
            return None
        tokenizer, messages = self.processor.tokenizer, conversation(image, self.instruction, self.system_prompt, text)
        try:
            rendered = self.processor.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        except ValueError as error:
            rendered = str(error)
        start = len(rendered) - len(text)
        if rendered[start:] != text:
            self.last_error = f"The reader's chat template does not leave a prompt as it is: {text[:100]!r}."
            return None
        if not tokenizer.is_fast:
            target = self._slow_target(rendered, text)
        else:
            told = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end - start for _, end in told["offset_mapping"]]
            first = next(place for place, end in enumerate(ends) if end > 0)  # it may begin in the template
            begins = [0, *ends[first:-1]]
            pieces = [text[begin:end] for begin, end in zip(begins, ends[first:], strict=True)]
            target = Target(told["input_ids"][first:], pieces)
        if target is not None and (special := self._special.intersection(target.ids)):
            names = tokenizer.convert_ids_to_tokens(sorted(special))
            self.last_error = f"A prompt holds {names[0]!r}, which is a special token of the reader."
            return None
        return target

    def _slow_target(self, rendered: str, text: str) -> Target | None:
        tokenizer = self.processor.tokenizer
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        tokens = [tokenizer.decode([token]) for token in ids]
        first = spelled(text, tokens)
        if first is None:
            self.last_error = (
                f"The tokens of {type(tokenizer).__name__}, which tells no offsets, do not spell a prompt: "
                f"{text[:100]!r}. Take a fast tokenizer."
            )
            return None
        return Target(ids[first:], cut(text, tokens[first:]))

    @cached_property
    def _special(self) -> set[int]:
        """Tokens that a prompt may not hold: they would open a turn, or stand for an image."""
        tokenizer = self.processor.tokenizer
        added = {token for token, word in tokenizer.added_tokens_decoder.items() if word.special}
        return added.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def _log_probs(self, ready: Prepared) -> list[Tensor]:
        """Compute the log-probs (T,) of each text's tokens."""
        ids, counts = ready.inputs["input_ids"], [len(target.ids) for target in ready.targets]
        spans = [torch.arange(end - count, end) for end, count in zip(ready.ends, counts, strict=True)]
        kept, places = torch.cat(spans).unique(return_inverse=True)
        logits = self.model(**ready.inputs, logits_to_keep=kept.to(ids.device) - 1, use_cache=False).logits
        rows = []
        for row, (target, at) in enumerate(zip(ready.targets, places.split(counts), strict=True)):
            own = logits[row, at.to(logits.device)]
            own = own if own.dtype == torch.float64 else own.float()
            rows.append(own.log_softmax(-1).gather(-1, torch.tensor(target.ids, device=own.device)[:, None])[:, 0])
        return rows
