"""The way to an OpenAI-compatible endpoint: connections, retries, and errors that may be shown."""

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import quote

from ..addresses import is_here, proxy_hint
from ..sessions import Session, Sessions


try:
    import httpx2
    from openai import APIConnectionError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient

    from .answers import upstream_error
except ImportError as error:
    raise ImportError(f"Models behind an endpoint need openai ({error}): pip install 'trl-unigrpo[judge]'.") from error


HOSTED = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"

_SECRETS = (
    (re.compile(r"data:image/[\w.+-]+;base64,[\w+/=%-]*"), "[image]"),
    (re.compile(r"(?<=://)[^/\s@]+@"), "[key]@"),
    (re.compile(r"(?i)(\bbearer\s+|\bapi[-_ ]?key['\"]?\s*[=:]\s*['\"]?)[^\s'\",}]+"), r"\1[key]"),
    (re.compile(r"\b[sr]k-[\w*.-]+"), "[key]"),
)
_HINTS = {
    400: "If this is about one of its arguments, a judge leaves it out with options={NAME: None}.",
    401: f"Set {KEY} in the environment.",
    403: f"Is {KEY} in the environment the endpoint's, and may it use this model?",
    404: "Look at the model's name, and at base_url, which mostly ends with /v1.",
    422: "If this is about one of its arguments, a judge leaves it out with options={NAME: None}.",
}


def endpoint_url(base_url: str | None) -> str:
    """
    Return the given URL, else that of OPENAI_BASE_URL, else the hosted one if there is a key.

    Raises:
        ValueError: if there is none, or it is no URL.
    """
    url = base_url or os.environ.get("OPENAI_BASE_URL") or (HOSTED if os.environ.get(KEY) else None)
    if url is None:
        raise ValueError(
            "There is no endpoint: pass base_url, as in base_url='http://localhost:8000/v1', or set OPENAI_BASE_URL, "
            f"or {KEY} for the hosted one."
        )
    if not re.fullmatch(r"https?://[^/@?][^@?]*", url):  # the client logs URLs
        raise ValueError(
            f"base_url={redact(url)!r}: expected http://... or https://... without a user, a password or a query; "
            f"a key belongs into {KEY}."
        )
    return url


def redact(text: str) -> str:
    """Clean a text that may be shown: without keys, credentials and images, 500 characters at most."""
    for name, value in os.environ.items():
        if name.startswith("OPENAI") and name.endswith("KEY") and value:
            text = text.replace(value, "[key]").replace(quote(value, safe=""), "[key]")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text if len(text) <= 500 else text[:497] + "..."


def explain(error: Exception, url: str) -> str:
    """Say in one line what went wrong and what to do about it."""
    cause, status = error.__cause__, getattr(error, "status_code", 0)
    if isinstance(cause, GarbageError):
        return redact(" ".join(str(cause).split()))
    hint = _HINTS.get(status, "")
    if isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        hint = f"Does a server answer at {url}? {proxy_hint(url)}"
    elif isinstance(error, APITimeoutError):
        hint = "Raise timeout, or ask for less at a time (concurrency)."
    elif isinstance(error, APIConnectionError) or status:
        hint = f"{hint} {proxy_hint(url, status)}"
    told = f" ({cause})" if cause is not None else ""
    return redact(" ".join(f"{type(error).__name__}: {error}{told} {hint}".split()))


class GarbageError(httpx2.RemoteProtocolError):
    """A success that is no answer; its text says so, and what to do."""


async def refuse_garbage(response: httpx2.Response) -> None:
    """Make a success that is no answer a broken connection, so that the client asks again, as it does after others."""
    if not response.is_success:
        return
    data, found = await response.aread(), "no JSON"
    try:
        body = json.loads(data)
        found = "JSON without choices"
        if error := upstream_error(body):
            raise GarbageError(f"The endpoint passes on a failure: {error}", request=response.request)
        if isinstance(body["choices"][0], dict):
            return
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    start = redact(response.text)[:100]
    raise GarbageError(
        f"The answer is {found}: {start!r}. Does base_url, mostly .../v1, speak OpenAI's protocol?",
        request=response.request,
    )


class PunctualClient(DefaultAsyncHttpxClient):
    """
    A client that gives a request so many seconds as a whole: the library's own timeouts begin anew with each byte, and
    servers send blank lines while they compute. Addresses of this machine are asked directly, not through a proxy.
    """

    def __init__(self, url: str, seconds: float):
        super().__init__(trust_env=not is_here(url), event_hooks={"response": [refuse_garbage]})
        self.seconds = seconds

    async def send(self, request: httpx2.Request, **settings: Any) -> httpx2.Response:
        try:
            async with asyncio.timeout(self.seconds):
                return await super().send(request, **settings)
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no whole answer within {self.seconds:g} s", request=request) from None


def open_client(url: str, timeout: float, max_retries: int) -> AsyncOpenAI:
    """
    Connect to an endpoint.

    Args:
        timeout: seconds that one try of a request may take, to the last byte of its answer.
        max_retries: more tries.
    """
    return AsyncOpenAI(
        base_url=url,
        api_key=os.environ.get(KEY) or "none",  # a local server asks for no key, the client does
        timeout=timeout,
        max_retries=max_retries,
        http_client=PunctualClient(url, timeout),
    )


class Endpoint:
    """An endpoint, its one client in each event loop, and the requests that it gets at a time."""

    def __init__(self, url: str, concurrency: int, timeout: float, max_retries: int):
        self.url, self.timeout, self.max_retries = url, timeout, max_retries
        self._sessions = Sessions(self._open, concurrency)

    def session(self) -> AbstractAsyncContextManager[Session]:
        """Open a session, or join the one that is open."""
        return self._sessions.use()

    def _open(self) -> tuple[AsyncOpenAI, Callable[[], Awaitable[None]]]:
        client = open_client(self.url, self.timeout, self.max_retries)
        return client, client.close
