"""A server of TRL reward functions over HTTP, for [`RemoteReward`]: `trl-unigrpo serve-rewards module:reward`.

    GET  /health         open to everyone: {"status": "ok", "version": ...}
    GET  /rewards        {"rewards": [names]}
    POST /score/{name}   {"prompts": [...], "completions": [...] or null, "images": [PNG in base64, ...],
                          "columns": {name: [...]}} -> {"scores": [number or null, ...]}

Errors are {"error": text}: 401 token, 404 name, 413 too much, 422 malformed, 500 the reward raised.
"""

import asyncio
import base64
import binascii
import functools
import inspect
import logging
import secrets
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

from PIL import Image

from ...__about__ import __version__
from ..addresses import is_loopback
from ..common import Scores, finite
from ..loading import load_reward
from .wire import (
    TooManyPixelsError,
    describe_error,
    from_png,
    read_token,
    safe_text,
)


try:
    import uvicorn
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(f"Serving rewards needs {error.name}: pip install 'trl-unigrpo[serve]'") from error


logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]

# Nobody reads this answer: its caller hung up.
GONE = 499
SHUTDOWN_SECONDS = 30


@dataclass(frozen=True)
class Limits:
    """
    The limits of a request; more is answered with 413.

    Args:
        max_images: images in a request.
        max_body: bytes of a request, its images in base64.
        max_pixels: width x height of an image, read from its header before it is decoded.
    """

    max_images: int = 64
    max_body: int = 256 * 2**20
    max_pixels: int = 2048 * 2048

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) < 1:
                raise ValueError(f"{limit.name}={getattr(self, limit.name)}: expected at least 1.")


class ScoreRequest(BaseModel):
    """The body that is posted to `/score/{name}`."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[Any]
    completions: list[Any] | None = None
    images: list[str]
    columns: dict[str, list[Any]] = Field(default_factory=dict)


@dataclass
class Batch:
    """A request, read: arguments of a TRL reward function."""

    prompts: list[Any]
    completions: list[Any] | None
    images: list[Image.Image]
    columns: dict[str, list[Any]] = field(default_factory=dict)


def reward_name(reward: RewardFunction) -> str:
    """Return the name that TRL gives a reward function in its metrics."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def is_async(reward: RewardFunction) -> bool:
    """Say whether calling it gives a coroutine."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def load_rewards(paths: Sequence[str]) -> dict[str, RewardFunction]:
    """Load rewards by the name that they are served under; ValueError if two share one."""
    rewards: dict[str, RewardFunction] = {}
    for path in paths:
        reward = load_reward(path)
        if getattr(reward, "reads_itself", False):
            _ = reward.reader  # type: ignore[attr-defined]  # raises: no model paints here
        name = reward_name(reward)
        if name in rewards:
            raise ValueError(f"{path!r} is called {name!r}, as another reward is. Give one another __name__.")
        rewards[name] = reward
    if not rewards:
        raise ValueError("No reward to serve. Name at least one as module:NAME.")
    return rewards


def read_batch(body: bytes, limits: Limits) -> Batch:
    """Check and decode a request's body; HTTPException 413 or 422, without its content, if it is not right."""
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise HTTPException(422, f"{where or 'body'}: {first['msg']}") from None
    number = len(request.images)
    if number > limits.max_images:
        raise HTTPException(413, f"{number} images, expected at most {limits.max_images}. Lower batch_size.")
    rows = {"prompts": request.prompts, "completions": request.completions, **request.columns}
    for name, values in rows.items():
        if values is not None and len(values) != number:
            raise HTTPException(422, f"{name} has {len(values)} values for {number} images, expected one per image.")
    images = []
    for index, text in enumerate(request.images):
        try:
            images.append(from_png(base64.b64decode(text, validate=True), limits.max_pixels))
        except TooManyPixelsError as error:
            raise HTTPException(413, f"images[{index}] {error}") from None
        except binascii.Error:
            raise HTTPException(422, f"images[{index}] is no base64.") from None
        except ValueError as error:
            raise HTTPException(422, f"images[{index}] {error}") from None
    return Batch(request.prompts, request.completions, images, request.columns)


def checked_scores(returned: Any, number: int) -> Scores:
    """Check what a reward returned: one float or None per image; NaN and infinity become None."""
    try:
        scores = [finite(score) for score in returned]
    except (TypeError, ValueError):
        raise TypeError(
            f"returned a {type(returned).__name__}, expected a list with a number, or None, per image."
        ) from None
    if len(scores) != number:
        raise ValueError(f"returned {len(scores)} scores for {number} images, expected one per image.")
    return scores


async def read_body(request: Request, limit: int, keep: bool = True) -> bytes:
    """
    Read the body of a request; HTTPException 413 if it is longer than `limit` bytes.

    What is too long is read on for as much again, though not kept, and so is the body of a request that is refused
    (`keep=False`): whoever is still sending would see a broken connection instead of the answer.
    """
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > 2 * limit:
            break
        if keep and size <= limit:
            body += chunk
    if size > limit:
        raise HTTPException(413, f"The request is longer than {limit} bytes. Lower batch_size.")
    return bytes(body)


class Endpoints:
    """
    The answers of the server.

    Args:
        rewards: by name.
        token: that a request must bring as `Authorization: Bearer ...`; None for none.
        limits: of a request.
    """

    def __init__(self, rewards: Mapping[str, RewardFunction], token: str | None = None, limits: Limits | None = None):
        self.rewards, self.token, self.limits = rewards, token, limits or Limits()
        # Synchronous rewards run one call at a time: models on a GPU seldom stand more.
        self._turns: dict[str, AbstractAsyncContextManager[Any]] = {
            name: nullcontext() if is_async(reward) else asyncio.Lock() for name, reward in rewards.items()
        }

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__})

    async def names(self, request: Request) -> Response:
        if not self._is_authorised(request):
            raise unauthorised()
        return JSONResponse({"rewards": list(self.rewards)})

    async def score(self, request: Request) -> Response:
        name: str = request.path_params["name"]
        refusal: HTTPException | None = None
        if not self._is_authorised(request):
            refusal = unauthorised()
        elif name not in self.rewards:
            refusal = HTTPException(404, f"No reward {name!r} here, only: {', '.join(self.rewards)}.")
        body = await read_body(request, self.limits.max_body, keep=refusal is None)
        if refusal is not None:
            raise refusal
        batch = await run_in_threadpool(read_batch, body, self.limits)
        async with self._turns[name]:
            if await request.is_disconnected():
                return Response(status_code=GONE)
            try:
                scores = checked_scores(await self._call(self.rewards[name], batch), len(batch.images))
            except Exception as error:
                logger.error(safe_text("".join(traceback.format_exception(error)), self.token, limit=20_000))
                raise HTTPException(500, f"{name} raised {describe_error(error, self.token)}") from None
        return JSONResponse({"scores": scores})

    async def _call(self, reward: RewardFunction, batch: Batch) -> Any:
        call = functools.partial(
            reward, prompts=batch.prompts, completions=batch.completions, images=batch.images, **batch.columns
        )
        return await call() if is_async(reward) else await run_in_threadpool(call)

    def _is_authorised(self, request: Request) -> bool:
        if self.token is None:
            return True
        given = request.headers.get("authorization", "").encode()
        return secrets.compare_digest(given, f"Bearer {self.token}".encode())


def unauthorised() -> HTTPException:
    return HTTPException(401, "Wrong or missing token.", headers={"WWW-Authenticate": "Bearer"})


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # for the type checker; registered for these alone
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


def build_app(
    rewards: Mapping[str, RewardFunction], token: str | None = None, limits: Limits | None = None
) -> Starlette:
    """Build the ASGI application; see [`Endpoints`] for the arguments."""
    endpoints = Endpoints(rewards, token, limits)
    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/rewards", endpoints.names),
            Route("/score/{name:path}", endpoints.score, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _answer_error, ClientDisconnect: _answer_nobody},
    )


def serve(
    paths: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str | None = None,
    limits: Limits | None = None,
) -> None:
    """
    Serve rewards until SIGINT or SIGTERM, then finish the requests that are running and stop.

    Args:
        paths: of the rewards, as `module:NAME`.
        host: to listen on. Other machines reach it only if it is not a loopback address.
        port: 0 for any free one.
        token_env: environment variable that holds the token; needed unless `host` is a loopback address.
        limits: of a request.

    Raises:
        ValueError: for a reward that is none, or a token that is missing.
    """
    if token_env is None and not is_loopback(host):
        raise ValueError(
            f"host={host!r} lets other machines call the rewards: pass --token-env with the name of an environment "
            "variable that holds a token, or listen on 127.0.0.1."
        )
    token = None if token_env is None else read_token(token_env)
    rewards = load_rewards(paths)
    config = uvicorn.Config(
        build_app(rewards, token, limits),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    socket = config.bind_socket()
    socket.listen(config.backlog)  # now, so that whoever reads the next line can connect
    address = f"[{host}]" if ":" in host else host
    print(f"Serving {', '.join(rewards)} on http://{address}:{socket.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[socket])
