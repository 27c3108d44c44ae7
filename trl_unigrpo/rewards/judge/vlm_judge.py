"""A vision-language model behind an endpoint as the judge of images."""

import asyncio
import base64
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ...messages import user_text
from ..common import (
    AsyncReward,
    Scores,
    Seen,
    check_images,
    column,
    finite,
    images_of,
    to_rgb,
)
from ..sessions import Session
from .answers import VERDICT_FORMAT, verdict_score, yes_probability
from .cache import AnswerCache
from .client import Endpoint, endpoint_url, explain
from .prompts import (
    MIN_ANSWER_SHARE,
    QUESTIONS,
    SYSTEM_PROMPT,
    TEMPLATES,
    fill,
    places,
)


logger = logging.getLogger(__name__)

MODES = ("logprobs", "score", "pairwise")
_FIRST_TOKEN = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
_VERDICT = {"max_tokens": 300, "response_format": VERDICT_FORMAT}

# Images to show, and what to ask about them; None where there is nothing to ask.
Request = tuple[list[Image.Image], str] | None


class VLMJudge(AsyncReward):
    """
    Scores images by a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, hosted).

    An async TRL reward, and an [`Asker`]. The image comes first in a request, then the question, so that a server
    that keeps prefixes reads each image once. A key is read from OPENAI_API_KEY; a local server needs none.

    ```python
    judge = VLMJudge("Qwen/Qwen3-VL-8B-Instruct", base_url="http://localhost:8000/v1")
    trainer = UniGRPOTrainer(model, reward_funcs=judge, ...)
    ```

    Args:
        model: name of the model at the endpoint.
        base_url: of the endpoint, as in `http://localhost:8000/v1`. By default OPENAI_BASE_URL, or the hosted one.
        mode: "logprobs" scores with P(yes) / (P(yes) + P(no)) of the first token, which is no answer unless these two
            have more than half of its probability. "score" asks for a number, for
            endpoints without log-probs. "pairwise" scores with P(yes) that the image beats a reference (RewardDance,
            arXiv 2509.08826).
        template: what is asked about an image. `{prompt}` and the names of the dataset's columns are places for texts,
            `{low}` and `{high}` for the score's range.
        question_template: how [`ask`] puts a question, with a place `{question}`.
        system_prompt: "" for none.
        score_range: of the number in mode "score"; mapped to [0, 1].
        reference: for mode "pairwise": the column with reference images, or a function of (prompts, images) that
            returns one image, or None, per image.
        max_side: larger images are scaled down to so many pixels; None for never.
        image_format: "jpeg" (quality 95) or "png", exact.
        concurrency: requests at a time, of all calls together. One that waits to be repeated keeps its place: an
            endpoint that is overloaded gets fewer.
        timeout: seconds that a request may take, to the last byte of its answer, before it is repeated.
        max_retries: repetitions of a request after a timeout, a dropped connection, an answer that is none, or the
            status 408, 409, 429 or 5xx; with growing pauses, or the endpoint's own (Retry-After).
        cache: a sqlite file that keeps the answers; None for none. Generated images hardly repeat, so it pays for
            evaluations that run again.
        options: more arguments of the client's `chat.completions.create`, None to leave one out, as in
            `{"max_tokens": None, "max_completion_tokens": 1}`.
        name: of the reward, in TRL's metrics.
        max_dead_batches: see [`Breaker`].

    Raises:
        ValueError: if there is no endpoint, or an argument is out of its range.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        mode: str = "logprobs",
        template: str | None = None,
        question_template: str | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        score_range: tuple[float, float] = (0, 10),
        reference: str | Callable[[list[str], list[Image.Image]], Sequence[Image.Image | None]] | None = None,
        max_side: int | None = 768,
        image_format: str = "jpeg",
        concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 6,
        cache: str | Path | None = None,
        options: dict[str, Any] | None = None,
        name: str = "VLMJudge",
        max_dead_batches: int = 3,
    ):
        check_requests(model, image_format, max_side, concurrency, max_retries, timeout)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
        if (reference is None) == (mode == "pairwise"):
            raise ValueError(
                f"reference={reference!r} with mode={mode!r}: 'pairwise' needs a reference, no other does."
            )
        if not score_range[0] < score_range[1]:
            raise ValueError(f"score_range={score_range}: expected (low, high) with low < high.")
        self.model, self.mode, self.reference = model, mode, reference
        self.system_prompt, self.score_range, self.options = system_prompt, score_range, options or {}
        self.template = template or TEMPLATES[mode]
        self.question_template = question_template or QUESTIONS["score" if mode == "score" else "logprobs"]
        self._places = places(self.template) - {"prompt", "low", "high"}
        if not self._places and "prompt" not in places(self.template):
            raise ValueError(f"The template {self.template!r} has no place for the prompt: write {{prompt}} in it.")
        if places(self.question_template) - {"low", "high"} != {"question"}:
            raise ValueError(f"question_template={self.question_template!r}: expected the place {{question}} alone.")
        super().__init__(name, max_dead_batches)
        self.last_error = ""
        self._endpoint = Endpoint(endpoint_url(base_url), concurrency, timeout, max_retries)
        self._encode = partial(data_url, max_side=max_side, image_format=image_format)
        self._cache = AnswerCache(cache) if cache is not None else None

    @property
    def per_image(self) -> bool:
        # A function that chooses references may choose among the images of a whole batch.
        return super().per_image and not callable(self.reference)

    async def answers(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        images: Sequence[Image.Image] = (),
        **columns: Any,
    ) -> list[Any]:
        """Ask for the scores of some images: in [0, 1], `None` where no answer came."""
        check_images(images, len(prompts))
        texts = list(map(user_text, prompts))
        named = {name: column(columns, name, self.__name__) for name in self._places}
        asked = [
            self._fill(self.template, prompt=text, **{name: str(values[i]) for name, values in named.items()})
            for i, text in enumerate(texts)
        ]
        shown = [[image] for image in images]
        if self.mode == "pairwise":
            references = self._references(texts, images, columns)
            shown = [[old, new] if old is not None else [] for old, new in zip(references, images, strict=True)]
        return await self._answers(
            [(visible, text) if visible else None for visible, text in zip(shown, asked, strict=True)]
        )

    def scores(
        self,
        answers: list[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
    ) -> Scores:
        self._breaker.observe(answers, self.last_error, log_metric)
        return answers

    async def ask(self, pairs: Sequence[tuple[Seen, str]]) -> Scores:
        """
        Return P(yes) in [0, 1] for each (image, question), `None` where no answer came. Of several images, in a list,
        it sees all, in their order.

        An image that appears several times is encoded once. `last_error` says what went wrong last.

        Raises:
            ValueError: in mode "pairwise", which compares two images.
        """
        if self.mode == "pairwise":
            raise ValueError("A judge with mode='pairwise' compares images: ask one with mode='logprobs' or 'score'.")
        return await self._answers(
            [(images_of(shown), self._fill(self.question_template, question=question)) for shown, question in pairs]
        )

    def _fill(self, template: str, **texts: str) -> str:
        low, high = self.score_range
        return fill(template, {"low": low, "high": high, **texts})

    def _references(
        self, prompts: list[str], images: Sequence[Image.Image], columns: dict[str, Any]
    ) -> Sequence[Image.Image | None]:
        if callable(self.reference):
            references = self.reference(prompts, list(images))
        else:
            references = column(columns, str(self.reference), self.__name__)
        if len(references) != len(images):
            raise ValueError(f"Got {len(references)} reference images for {len(images)} images: expected as many.")
        given = [image for image in references if image is not None]
        check_images(given, len(given))
        if len(given) < len(images):
            self.last_error = "There was no reference image."
        return references

    async def _answers(self, requests: Sequence[Request]) -> Scores:
        urls: dict[int, str] = {}

        def url_of(image: Image.Image) -> str:
            if id(image) not in urls:
                urls[id(image)] = self._encode(image)
            return urls[id(image)]

        async with self._endpoint.session() as session:
            scores = await asyncio.gather(*(self._answer(session, request, url_of) for request in requests))
        if failed := sum(score is None for score in scores):
            logger.warning("%s: %d of %d without an answer. %s", self.__name__, failed, len(scores), self.last_error)
        return scores

    async def _answer(self, session: Session, request: Request, url_of: Callable[[Image.Image], str]) -> float | None:
        if request is None:
            return None
        images, text = request
        try:
            async with session.slots:
                body = self._body(list(map(url_of, images)), text)
                key = self._key(body) if self._cache is not None else ""
                if self._cache is not None and (known := self._cache.get(key)) is not None:
                    return known
                answer = await session.client.chat.completions.with_raw_response.create(**body)
            score = finite(self._read(json.loads(answer.text)))
        except Exception as error:  # whatever it is, one image without a score must not end a training
            self.last_error = explain(error, self._endpoint.url)
            return None
        if self._cache is not None and score is not None:
            self._cache.put(key, score)
        return score

    def _body(self, urls: Sequence[str], text: str) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        answer = _VERDICT if self.mode == "score" else _FIRST_TOKEN
        body = {"model": self.model, "messages": messages, "temperature": 0, **answer, **self.options}
        return {name: value for name, value in body.items() if value is not None}

    def _key(self, body: dict[str, Any]) -> str:
        """Hash everything that the score depends on: endpoint, model, images, texts, options, what is an answer."""
        whole = [self._endpoint.url, self.mode, self.score_range, MIN_ANSWER_SHARE, body]
        return hashlib.sha256(json.dumps(whole, default=repr).encode()).hexdigest()

    def _read(self, body: Any) -> float:
        return verdict_score(body, *self.score_range) if self.mode == "score" else yes_probability(body)


def check_requests(
    model: str, image_format: str, max_side: int | None, concurrency: int, max_retries: int, timeout: float
) -> None:
    """Raise ValueError for an argument of requests that is out of its range."""
    if not model:
        raise ValueError("model is empty: expected the name under which the endpoint serves the model.")
    if image_format not in ("jpeg", "png"):
        raise ValueError(f"image_format={image_format!r}: expected 'jpeg' or 'png'.")
    for argument, value, least in (
        ("max_side", max_side, 1),
        ("concurrency", concurrency, 1),
        ("max_retries", max_retries, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{argument}={value}: expected at least {least}.")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout}: expected seconds above 0.")


def data_url(image: Image.Image, max_side: int | None = 768, image_format: str = "jpeg") -> str:
    """Write the image as a `data:` URL."""
    buffer = io.BytesIO()
    to_rgb(image, max_side).save(buffer, image_format, **({"quality": 95} if image_format == "jpeg" else {}))
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
