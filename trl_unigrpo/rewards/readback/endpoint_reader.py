"""A vision-language model behind an endpoint as the reader."""

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from ..judge.answers import NoAnswer
from ..judge.client import Endpoint, endpoint_url, explain
from ..judge.vlm_judge import check_requests, data_url
from ..sessions import Session
from .reading import Reading, cut, spelled


NEVER = -9999.0
"""The number that vLLM writes for log 0."""
ROUNDING = 1e-3
"""The most that rounding may lift a log-prob above 0."""

# vLLM's own arguments: the log-prob of each prompt token and of no other one, behind a last message that stays open.
_READ = {"prompt_logprobs": 0, "add_generation_prompt": False, "continue_final_message": True}
_NO_LOG_PROBS = (
    "The endpoint gives no log-probs of its prompt. vLLM does (`vllm serve MODEL`), most others do not. Read in this "
    "process instead: ReadBackReward('Qwen/Qwen3-VL-8B-Instruct')."
)


class EndpointReader:
    """
    Reads by a vision-language model behind an endpoint that gives log-probs of its prompt, as vLLM does. A [`Reader`].

    The image is the user's turn, the text the open end of the assistant's, and one token is sampled and thrown away.
    A key is read from OPENAI_API_KEY; a local server needs none.

    ```python
    reader = EndpointReader("Qwen/Qwen3-VL-8B-Instruct", base_url="http://localhost:8000/v1")
    trainer = UniGRPOTrainer(model, reward_funcs=ReadBackReward(reader), ...)
    ```

    Args:
        model: name of the model at the endpoint.
        base_url: of the endpoint, as in `http://localhost:8000/v1`. By default OPENAI_BASE_URL.
        instruction: what the user says beside the image; "" for nothing.
        system_prompt: "" for none.
        max_side, image_format, concurrency, timeout, max_retries, options: see [`VLMJudge`].

    Raises:
        ValueError: if there is no endpoint, or an argument is out of its range.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        instruction: str = "",
        system_prompt: str = "",
        max_side: int | None = 768,
        image_format: str = "jpeg",
        concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 6,
        options: dict[str, Any] | None = None,
    ):
        check_requests(model, image_format, max_side, concurrency, max_retries, timeout)
        self.model, self.instruction, self.system_prompt = model, instruction, system_prompt
        self.max_side, self.image_format, self.options = max_side, image_format, options or {}
        self.last_error = ""
        self._endpoint = Endpoint(endpoint_url(base_url), concurrency, timeout, max_retries)

    def read(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Reading | None]:
        with ThreadPoolExecutor(1) as thread:  # the caller's may have an event loop that runs
            return thread.submit(asyncio.run, self.read_async(images, texts)).result()

    async def read_async(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Reading | None]:
        """Read as `read` does; several calls at a time share the places for requests."""
        async with self._endpoint.session() as session:
            pairs = zip(images, texts, strict=True)
            return await asyncio.gather(*(self._read_one(session, image, text.strip()) for image, text in pairs))

    async def _read_one(self, session: Session, image: Image.Image, text: str) -> Reading | None:
        try:
            async with session.slots:
                answer = await session.client.chat.completions.with_raw_response.create(**self._body(image, text))
            return to_reading(json.loads(answer.text), text)
        except Exception as error:  # whatever it is, one image without a score must not end a training
            self.last_error = explain(error, self._endpoint.url)
            return None

    def _body(self, image: Image.Image, text: str) -> dict[str, Any]:
        url = data_url(image, self.max_side, self.image_format)
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
        if self.instruction:
            content.append({"type": "text", "text": self.instruction})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 1, **self.options}
        body["extra_body"] = {**_READ, **self.options.get("extra_body", {})}
        return {name: value for name, value in body.items() if value is not None}


def to_reading(body: Any, text: str) -> Reading:
    """
    Find the log-probs of a text, which ends the prompt, in an answer with `prompt_logprobs`.

    Raises:
        NoAnswer: if the answer has none, or they are of another text.
    """
    try:
        rows = (body.get("prompt_logprobs") or [])[1:]  # nothing stands before the first token
        if not rows or not all(rows):
            raise NoAnswer(_NO_LOG_PROBS)
        found = [next(iter(row.values())) for row in rows]  # the prompt's own token comes first
        tokens = [token["decoded_token"] or "" for token in found]
        first = spelled(text, tokens)
        if first is None:
            raise NoAnswer(
                f"The prompt at the endpoint does not end with {text[:100]!r}, but with {''.join(tokens)[-100:]!r}. "
                "Does its server know `continue_final_message`, and its chat template leave the assistant's text as "
                "it is?"
            )
        log_probs = [float(token["logprob"]) for token in found[first:]]
    except (LookupError, TypeError, AttributeError) as error:
        raise NoAnswer(f"The endpoint's `prompt_logprobs` are not in vLLM's form: {error!r}.") from None
    if not all(NEVER < log_prob < ROUNDING for log_prob in log_probs):
        raise NoAnswer(f"The endpoint's log-probs go from {min(log_probs)} to {max(log_probs)}: expected log-probs.")
    return Reading(cut(text, tokens[first:]), [min(log_prob, 0.0) for log_prob in log_probs])
