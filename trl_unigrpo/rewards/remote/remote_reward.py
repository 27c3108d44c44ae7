"""A reward in another process or on another machine, served by `trl-unigrpo serve-rewards`."""

import asyncio
import base64
import json
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlsplit

from PIL import Image

from ..addresses import is_here, proxy_hint
from ..common import (
    AsyncReward,
    Scores,
    check_images,
    column,
    finite,
)
from ..sessions import Session, Sessions
from .wire import (
    describe_error,
    read_token,
    safe_text,
    to_png,
)


try:
    import httpx2
except ImportError as error:
    raise ImportError("RemoteReward needs httpx2: pip install 'trl-unigrpo[serve]'") from error


logger = logging.getLogger(__name__)

# What TRL passes beside the dataset's columns and what stays in this process.
NOT_SENT = ("trainer_state", "log_extra", "log_metric", "environments")

# Seconds.
CHECK_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0

# Its own generator: waits must not move the one that a run's seed has set.
_jitter = random.Random()


class RequestError(RuntimeError):
    """A request that gave no scores."""


class RemoteReward(AsyncReward):
    """
    A TRL reward function that asks a server for its scores.

    Images travel as PNG, pixel for pixel, together with prompts, completions and the dataset's columns as JSON. A
    request that fails, after its retries, gives `None` for its images; batches in a row without any score stop the
    run, see [`Breaker`].

    Args:
        url: of the server, such as `"http://127.0.0.1:8000"`.
        name: of the reward on the server, and in TRL's metrics. Without it the server is asked, now, for its only one.
        token_env: environment variable that holds the server's token; it is read at each call and never kept.
        batch_size: images per request.
        concurrency: requests at once, of all calls together.
        timeout: seconds that one request may take, its wait for other requests on the server included.
        max_retries: of a request, after 429, 5xx, timeouts and lost connections, with pauses of 0.5, 1, 2 ... s.
        columns: names of the columns to send; all of them without it.
        max_dead_batches: see [`Breaker`].
        check: ask the server now whether it is there, takes the token, and has this reward.

    Raises:
        ValueError: for an argument that can't be right, or, if the server is asked, a name that it does not have.
        ConnectionError, PermissionError: if the server is asked and does not answer, or refuses the token.
    """

    def __init__(
        self,
        url: str,
        name: str | None = None,
        *,
        token_env: str | None = None,
        batch_size: int = 8,
        concurrency: int = 4,
        timeout: float = 120.0,
        max_retries: int = 3,
        columns: Sequence[str] | None = None,
        max_dead_batches: int = 3,
        check: bool = False,
    ):
        for argument, value, least in (
            ("batch_size", batch_size, 1),
            ("concurrency", concurrency, 1),
            ("max_retries", max_retries, 0),
        ):
            if value < least:
                raise ValueError(f"{argument}={value}: expected at least {least}.")
        if timeout <= 0:
            raise ValueError(f"timeout={timeout}: expected a positive number of seconds.")
        self.url, self.token_env = checked_url(url), token_env
        self.batch_size, self.concurrency = batch_size, concurrency
        self.timeout, self.max_retries = timeout, max_retries
        self.columns = None if columns is None else tuple(columns)
        self._token()
        super().__init__(self._find(name) if check or name is None else name, max_dead_batches)
        self._sessions = Sessions(self._open, concurrency)

    async def answers(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        images: Sequence[Image.Image] = (),
        **columns: Any,
    ) -> list[Any]:
        """Ask for the scores of some images: (score, "") of each, or (None, why there is none)."""
        check_images(images, len(prompts))
        rows = {
            "prompts": as_json("prompts", prompts, len(prompts)),
            "completions": None if completions is None else as_json("completions", completions, len(prompts)),
        }
        sent = {name: as_json(name, values, len(prompts)) for name, values in self._sent(columns).items()}
        token = self._token()

        async def ask(session: Session, part: slice) -> tuple[Scores, str]:
            request: dict[str, Any] = {key: values and values[part] for key, values in rows.items()}
            request["columns"] = {name: values[part] for name, values in sent.items()}
            try:
                async with session.slots:
                    return await self._post(session.client, request, images[part]), ""
            # Whatever went wrong: a score is missing, the run goes on, and the breaker counts.
            except Exception as error:
                return [None] * len(images[part]), describe_error(error, token)

        async with self._sessions.use() as session:
            starts = range(0, len(prompts), self.batch_size)
            answers = await asyncio.gather(*(ask(session, slice(i, i + self.batch_size)) for i in starts))
        errors = [error for _, error in answers if error]
        if errors:
            logger.warning("%s: %d of %d requests failed. %s", self.__name__, len(errors), len(answers), errors[-1])
        return [(score, error) for part, error in answers for score in part]

    def scores(
        self,
        answers: list[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
    ) -> Scores:
        errors = [error for _, error in answers if error]
        scores = [score for score, _ in answers]
        self._breaker.observe(scores, errors[-1] if errors else "", log_metric)
        return scores

    def _open(self) -> tuple[httpx2.AsyncClient, Callable[[], Awaitable[None]]]:
        client = httpx2.AsyncClient(**self._settings(self._token()))
        return client, client.aclose

    async def _post(
        self, client: httpx2.AsyncClient, request: dict[str, Any], images: Sequence[Image.Image]
    ) -> Scores:
        """Ask for the scores of one request; RequestError if it gave none after all its retries."""
        body = await asyncio.to_thread(request_body, request, images)
        for attempt in range(self.max_retries + 1):
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * _jitter.uniform(0.75, 1.25)
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await client.post(
                        f"/score/{quote(self.__name__, safe='')}",
                        content=body,
                        headers={"Content-Type": "application/json"},
                    )
            except TimeoutError:
                problem = f"{self.url} did not answer within {self.timeout:g} s."
            except httpx2.TransportError as error:
                problem = f"{self.url}: {describe_error(error)} {proxy_hint(self.url)}".rstrip()
            else:
                if answer.is_success:
                    return read_scores(answer, len(images))
                hint = proxy_hint(self.url, answer.status_code)
                problem = f"{self.url} answered {answer.status_code}: {error_text(answer)} {hint}".rstrip()
                if answer.status_code != 429 and answer.status_code < 500:
                    break
                pause = max(pause, retry_after(answer))
            if attempt < self.max_retries:
                await asyncio.sleep(pause)
        raise RequestError(problem)

    def _sent(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Choose the columns that travel."""
        if self.columns is None:
            return {name: values for name, values in columns.items() if name not in NOT_SENT}
        return {name: column(columns, name, self.__name__) for name in self.columns}

    def _token(self) -> str | None:
        return None if self.token_env is None else read_token(self.token_env)

    def _settings(self, token: str | None) -> dict[str, Any]:
        """Return the arguments of an HTTP client."""
        return {
            "base_url": self.url,
            "headers": {} if token is None else {"Authorization": f"Bearer {token}"},
            "trust_env": not is_here(self.url),
            "timeout": None,  # whoever asks bounds the whole time, which httpx does not
        }

    async def _greet(self) -> tuple[httpx2.Response, httpx2.Response]:
        """Ask the server for its health and its rewards; TimeoutError if the two take longer than `CHECK_SECONDS`."""
        async with asyncio.timeout(CHECK_SECONDS), httpx2.AsyncClient(**self._settings(self._token())) as client:
            return await client.get("/health"), await client.get("/rewards")

    def _find(self, name: str | None) -> str:
        """Return the name, once the server has confirmed it; without one, that of its only reward."""
        try:
            with ThreadPoolExecutor(1) as thread:  # a loop may be running in this one
                health, answer = thread.submit(asyncio.run, self._greet()).result()
        except TimeoutError:
            raise ConnectionError(
                f"{self.url} did not answer within {CHECK_SECONDS:g} s. Is a reward server listening there? "
                f"{proxy_hint(self.url)}".rstrip()
            ) from None
        except httpx2.TransportError as error:
            raise ConnectionError(
                f"No reward server answers at {self.url} ({describe_error(error)}). Start one: trl-unigrpo "
                f"serve-rewards module:reward {proxy_hint(self.url)}".rstrip()
            ) from None
        if answer.status_code == 401:
            place = "pass token_env" if self.token_env is None else f"it is not the one in {self.token_env}"
            raise PermissionError(f"{self.url} wants a token: {place}.")
        try:
            ok = health.json()["status"] == "ok"
            names = answer.json()["rewards"] if ok else []
        except (ValueError, KeyError, TypeError):
            names = []
        if not names:
            raise ConnectionError(
                f"{self.url} answers {health.status_code} and {answer.status_code}, but not as a reward server. Is "
                "something else listening there?"
            )
        if name is None and len(names) == 1:
            return str(names[0])
        if name is None or name not in names:
            known = ", ".join(map(str, names))
            raise ValueError(f"name={name!r}: {self.url} serves {known}. Pass one of these names.")
        return name


def checked_url(url: str) -> str:
    """
    Return the server's address without a slash at its end; ValueError if it is none, or holds more than an address.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises if it is no number
    except ValueError as error:
        raise ValueError(f"url is no address ({error}): expected one such as 'http://127.0.0.1:8000'.") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("url holds a user or a password, which would end up in logs: pass the token by token_env.")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"url={url!r}: expected an address such as 'http://127.0.0.1:8000'.")
    return url.rstrip("/")


def as_json(name: str, values: Sequence[Any], number: int) -> list[Any]:
    """Return a column as a list; TypeError if JSON can't hold it, ValueError if it hasn't one value per image."""
    if len(values) != number:
        raise ValueError(f"{name} has {len(values)} values for {number} images, expected one per image.")
    try:
        json.dumps(list(values), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} can't be sent as JSON ({error}). If it is a column of the dataset, leave it out: name those that "
            "the reward reads by columns=[...]."
        ) from error
    return list(values)


def request_body(request: dict[str, Any], images: Sequence[Image.Image]) -> bytes:
    """Write the request as JSON, its images as PNG in base64."""
    encoded = [base64.b64encode(to_png(image)).decode() for image in images]
    return json.dumps({**request, "images": encoded}, allow_nan=False).encode()


def read_scores(answer: httpx2.Response, number: int) -> Scores:
    """Read the scores in an answer; RequestError if there is not one number or null per image."""
    try:
        body = answer.json()
        scores = None if body.get("error") else body["scores"]
    except (ValueError, KeyError, AttributeError):
        scores = None
    if (
        not isinstance(scores, list)
        or len(scores) != number
        or not all(score is None or type(score) in (int, float) for score in scores)
    ):
        raise RequestError(f"{answer.url} answered {safe_text(answer.text)!r}, expected {number} scores.")
    return [finite(score) for score in scores]


def error_text(answer: httpx2.Response) -> str:
    """Read what the server says about an error; a proxy's page, cut, if it is not ours."""
    try:
        return safe_text(str(answer.json()["error"]))
    except (ValueError, KeyError, TypeError):
        return safe_text(answer.text) or answer.reason_phrase


def retry_after(answer: httpx2.Response) -> float:
    """Read the seconds that the server asks to wait; 0 if it doesn't say, or says it as a date."""
    try:
        return min(max(0.0, float(answer.headers.get("retry-after", 0))), LONGEST_PAUSE)
    except ValueError:
        return 0.0
