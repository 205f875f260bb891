"""Waiting for what another thread tells, and for the client to leave, whichever comes first."""

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

from starlette.requests import Request

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def listen(request: Request, news: "asyncio.Queue[T]") -> AsyncGenerator[T, None]:
    """The news, without end. Raises ClientGone as soon as the client has closed its connection."""
    gone = asyncio.ensure_future(_left(request))
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(news.get())
            await asyncio.wait({gone, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientGone
            yield waiting.result()
    finally:
        gone.cancel()
        if waiting is not None:
            waiting.cancel()


async def _left(request: Request) -> None:
    """Returns when the client has closed its connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
