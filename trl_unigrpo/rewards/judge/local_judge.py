"""A vision-language model in this process as the judge of images."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..common import (
    ImageReward,
    Scores,
    Seen,
    finite,
    images_of,
    to_rgb,
)
from ..local_vlm import LocalVLM, conversation, to_image
from .prompts import (
    MIN_ANSWER_SHARE,
    QUESTIONS,
    SYSTEM_PROMPT,
    TEMPLATES,
    answer_word,
    fill,
    no_answer_word,
    places,
)


class LocalVLMJudge(LocalVLM, ImageReward):
    """
    Scores images by P(yes) / (P(yes) + P(no)) of a transformers image-text-to-text model: one forward, no sampling.
    Where these two have no more than half of the next token's probability, the model has not answered: no score.

    An [`ImageReward`], an [`Asker`], and differentiable in the pixels. The questions are those of [`VLMJudge`].

    ```python
    judge = LocalVLMJudge("llava-hf/llava-1.5-7b-hf", device="cuda", dtype="bfloat16")
    trainer = UniGRPOTrainer(model, reward_funcs=judge, ...)
    ```

    Args:
        model, processor, dtype, device, batch_size, max_side, offload: see [`LocalVLM`].
        template: what is asked about an image, with the place `{prompt}`.
        question_template: how [`ask`] puts a question, with the place `{question}`.
        system_prompt: "" for none.
        name, max_dead_batches: see [`ImageReward`].

    Raises:
        ValueError: if an argument is wrong, the model reads no images, or its vocabulary has no token for yes or no.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        template: str = TEMPLATES["logprobs"],
        question_template: str = QUESTIONS["logprobs"],
        system_prompt: str = SYSTEM_PROMPT,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        batch_size: int = 8,
        max_side: int | None = 768,
        offload: bool = True,
        name: str | None = None,
        max_dead_batches: int = 3,
    ):
        ImageReward.__init__(self, name, max_dead_batches)
        for argument, text, place in (
            ("template", template, "prompt"),
            ("question_template", question_template, "question"),
        ):
            if places(text) != {place}:
                raise ValueError(f"{argument}={text!r}: expected the place {{{place}}} alone.")
        LocalVLM.__init__(
            self,
            model,
            processor,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            max_side=max_side,
            offload=offload,
        )
        self.template, self.question_template, self.system_prompt = template, question_template, system_prompt
        self._words = answer_ids(self.processor.tokenizer)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any]) -> Scores:
        return self._probabilities(images, [fill(self.template, {"prompt": prompt}) for prompt in prompts])

    async def ask(self, pairs: Sequence[tuple[Seen, str]]) -> Scores:
        """
        Return P(yes) in [0, 1] for each (image, question), computed in a thread, so that other rewards can go on. Of
        several images, in a list, it sees all, in their order.
        """
        images, questions = [shown for shown, _ in pairs], [question for _, question in pairs]
        return await asyncio.to_thread(self._probabilities, images, self._questions(questions))

    def differentiable(self, pixels: Tensor, questions: Sequence[str]) -> Tensor:
        """
        Compute P(yes) for each image, with a gradient to its pixels.

        The weights stay on the device, for the backward pass: call [`release`] after it.

        Args:
            pixels: (B, 3, H, W) in [0, 1].
            questions: B texts, put as [`ask`] puts them.

        Returns:
            (B,) in [0, 1], NaN where the model begins with another word.

        Raises:
            ValueError: if there is not one question per image, or the model's image processor does more than resize,
                crop, rescale and normalise.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != len(questions):
            raise ValueError(
                f"Got pixels of shape {tuple(pixels.shape)} and {len(questions)} questions: expected (B, 3, H, W) and "
                "as many questions."
            )
        self.placed()
        # The processor lays out the text and says what the model expects to see; the pixels take another way.
        inputs = self._inputs([to_image(image) for image in pixels.detach()], self._questions(questions))
        return self._yes_probabilities(self.see(inputs, pixels)).to(pixels)

    def _questions(self, questions: Sequence[str]) -> list[str]:
        return [fill(self.question_template, {"question": question}) for question in questions]

    def _probabilities(self, images: Sequence[Seen], texts: Sequence[str]) -> Scores:
        def some(part: slice) -> Scores:
            shown = [[to_rgb(image, self.max_side) for image in images_of(row)] for row in images[part]]
            return list(map(finite, self._yes_probabilities(self._inputs(shown, texts[part])).tolist()))

        with self.loaded(), torch.no_grad():
            return self.in_batches(len(images), some)

    def _inputs(self, images: Sequence[Seen], texts: Sequence[str]) -> Any:
        rows = zip(images, texts, strict=True)
        return self.tokenized([conversation(shown, text, self.system_prompt) for shown, text in rows])

    def _yes_probabilities(self, inputs: Any) -> Tensor:
        """Compute P(yes) / (P(yes) + P(no)) of the next token, (B,); NaN, with the reason, where it is no answer."""
        log_probs = self._next_token(inputs)
        yes, no = (log_probs[:, self._words[word]].logsumexp(1) for word in ("yes", "no"))
        shares = (yes.exp() + no.exp()).detach()
        if not shares.isfinite().all():
            self.last_error = f"The model answers NaN in {self.model.dtype}: try another dtype."
        elif (shares <= MIN_ANSWER_SHARE).any():
            row = int(shares.argmin())
            likely = log_probs[row].detach().exp().topk(3)
            names = self.processor.tokenizer.convert_ids_to_tokens(likely.indices.tolist())
            tops = list(zip(names, likely.values.tolist(), strict=True))
            self.last_error = (
                f"{no_answer_word(tops, shares[row].item())} Choose a model that does not think first, or other words "
                "in the template."
            )
        return (yes - no).sigmoid().masked_fill(~(shares > MIN_ANSWER_SHARE), torch.nan)

    def _next_token(self, inputs: Any) -> Tensor:
        """Compute the log-probabilities of the next token, (B, V)."""
        last = inputs["attention_mask"].sum(1) - 1
        kept, place = last.unique(return_inverse=True)
        logits = self.model(**inputs, logits_to_keep=kept).logits
        logits = logits[torch.arange(len(place), device=logits.device), place]
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)


def answer_ids(tokenizer: Any) -> dict[str, list[int]]:
    """
    Find all tokens that spell yes and no, by word.

    Raises:
        ValueError: if the vocabulary has none for one of them.
    """
    ids: dict[str, list[int]] = {"yes": [], "no": []}
    for token, index in tokenizer.get_vocab().items():
        if word := answer_word(token):
            ids[word].append(index)
    if missing := [word for word, found in ids.items() if not found]:
        raise ValueError(
            f"The tokenizer {type(tokenizer).__name__} has no token for {missing[0]!r}: this model can't be "
            "asked for one."
        )
    return ids
