"""The application in the configuration in force, and in those before it in which requests are still under way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

from starlette.applications import Starlette
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from gateway.app import create_app
from gateway.config import Config
from gateway.lasting import Lasting
from gateway.reload import Settings
from gateway.siblings import Answer
from gateway.tasks import end

log = logging.getLogger("fingerpost")

PUBLISH_SECONDS = 1.0  # between two times that a worker writes its gauges where the others find them


class Generation:
    """The application in one configuration, with the clients it has open."""

    def __init__(self, settings: Settings, lasting: Lasting) -> None:
        self.config = settings.config
        self._app = create_app(settings.config, settings.contract, lasting)
        self._state: Mapping[str, Any] = {}
        self._opened = contextlib.AsyncExitStack()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> None:
        lifespan = cast(AbstractAsyncContextManager[Mapping[str, Any]], self._app.router.lifespan_context(self._app))
        self._state = await self._opened.enter_async_context(lifespan) or {}

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"].update(self._state)
        self._running += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    @property
    def answers(self) -> Mapping[str, Answer]:
        """To what other workers ask, by the question's name."""
        return cast(Mapping[str, Answer], self._state["answers"])

    def publish(self) -> None:
        """Bring its gauges up to date."""
        self._state["chat"].publish()

    async def retire(self) -> None:
        """Close when no request is under way in it any more, or nobody waits for that any longer."""
        try:
            await self._idle.wait()
        finally:
            await self.close()
        log.info("the last request in an earlier configuration has ended, and its clients are closed")

    async def close(self) -> None:
        await self._opened.aclose()


class Generations:
    """The ASGI application: each request is answered in the configuration that is in force when it comes in."""

    def __init__(self, settings: Settings, lasting: Lasting) -> None:
        self._lasting = lasting
        self._current = Generation(settings, lasting)
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def config(self) -> Config:
        """The one in force."""
        return self._current.config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await Router(lifespan=self._lifespan)(scope, receive, send)
        else:
            await self._current.answer(scope, receive, send)

    async def change(self, settings: Settings) -> None:
        """Answer in this configuration from now on. What fails, fails before anything has changed."""
        new = Generation(settings, self._lasting)
        await new.open()
        old, self._current = self._current, new
        self._lasting.metrics.clear_parts()
        new.publish()
        retiring = asyncio.create_task(old.retire())
        self._retiring.add(retiring)
        retiring.add_done_callback(self._forget)

    def _forget(self, retired: asyncio.Task[None]) -> None:
        self._retiring.discard(retired)
        asyncio.get_running_loop().call_soon(gc.collect)  # an application is a ring of megabytes

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            await self._current.open()
            if siblings := self._lasting.siblings:
                await stack.enter_async_context(siblings.answering(lambda: self._current.answers))
                publishing = asyncio.create_task(self._publish())
                stack.callback(publishing.cancel)
            yield {"metrics": self._lasting.metrics}

    async def _close(self) -> None:
        """Close all; nothing is under way any more, or is no longer waited for."""
        await end(self._retiring)
        await self._current.close()
        await self._lasting.close()

    async def _publish(self) -> None:
        while True:
            self._current.publish()
            await asyncio.sleep(PUBLISH_SECONDS)
