"""Connections to a server, and how many requests it gets at a time, over all calls that run at once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Session:
    """A client and the places for its requests, of one event loop."""

    client: Any
    close: Callable[[], Awaitable[None]]
    slots: asyncio.Semaphore
    users: int = 0


class Sessions:
    """
    One [`Session`] per running event loop, shared by all that use it at a time and closed by the last of them.

    Connections belong to the loop that opened them; TRL scores on a loop of its own, `asyncio.run` makes new ones.

    Args:
        open_client: gives a client, and what closes it.
        concurrency: requests at a time.
    """

    def __init__(self, open_client: Callable[[], tuple[Any, Callable[[], Awaitable[None]]]], concurrency: int):
        self.open_client, self.concurrency = open_client, concurrency
        self._of: dict[asyncio.AbstractEventLoop, Session] = {}

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        loop = asyncio.get_running_loop()
        session = self._of.get(loop)
        if session is None:
            session = self._of[loop] = Session(*self.open_client(), asyncio.Semaphore(self.concurrency))
        session.users += 1
        try:
            yield session
        finally:
            session.users -= 1
            if not session.users:
                del self._of[loop]
                await session.close()
