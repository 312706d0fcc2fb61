"""Talking to vLLM: a request to the first endpoint of a model that takes it, and its answer as it comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping

import aiohttp

from gateway import config
from gateway.errors import UpstreamTimeout, UpstreamUnavailable
from gateway.metrics import Metrics

log = logging.getLogger("fingerpost")

PATH = "/v1/chat/completions"
KEEP_ALIVE_SECONDS = 4  # less than vLLM's 5, so that no request meets a connection that is just being closed
# What an answer's header may tell the client; the rest describes this connection, not the answer.
PASSED_ON = ("content-type", "retry-after")


class UpstreamBroken(Exception):
    """The endpoint ended its answer before it was whole."""


class Reply:
    """An endpoint's answer, its body not yet read; must be closed."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.is_stream = response.content_type == "text/event-stream"
        self.headers: Mapping[str, str] = {
            name: response.headers[name] for name in PASSED_ON if name in response.headers
        }

    async def body(self) -> bytes:
        """All of it. Raises `UpstreamBroken`."""
        try:
            return await self._response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UpstreamBroken(str(error)) from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises `UpstreamBroken`."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UpstreamBroken(str(error)) from error

    def close(self) -> None:
        """Let go of the connection; an unfinished answer is abandoned, which tells vLLM to stop generating."""
        self._response.close()


class Upstream:
    """Client of the configured models' endpoints."""

    def __init__(self, settings: config.Upstream, metrics: Metrics) -> None:
        self._metrics = metrics
        self._turn = 0
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=settings.connect_timeout_seconds, sock_read=settings.idle_timeout_seconds
            ),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )

    async def send(self, model: config.Model, body: bytes, request_id: str) -> Reply:
        """Post `body` to the model's endpoints in turn until one answers, whatever its status.

        Raises `UpstreamUnavailable` when none can be reached, `UpstreamTimeout` when one took it and fell silent.
        """
        endpoints = in_turn(model.endpoints, self._turn)
        self._turn += 1
        for endpoint in endpoints:
            try:
                return Reply(await self._session.post(endpoint + PATH, data=body, headers=_headers(model, request_id)))
            except aiohttp.SocketTimeoutError as error:  # it has the request: another endpoint would only do it twice
                self._failed(model, endpoint, request_id, error)
                raise UpstreamTimeout(f"model {model.name!r} was silent for too long") from error
            except (aiohttp.ClientError, TimeoutError) as error:
                self._failed(model, endpoint, request_id, error)
        raise UpstreamUnavailable(f"no endpoint of model {model.name!r} can be reached")

    def next_endpoint(self, model: config.Model) -> str:
        """The one that the next request for the model is sent to first."""
        return in_turn(model.endpoints, self._turn)[0]

    def _failed(self, model: config.Model, endpoint: str, request_id: str, error: Exception) -> None:
        self._metrics.endpoint_errors.labels(model.name, endpoint).inc()
        log.warning("%s: model %s: %s: %s", request_id, model.name, endpoint, str(error) or type(error).__name__)

    async def check(self, model: config.Model) -> bool:
        """Whether some endpoint of the model is healthy."""
        return any(await asyncio.gather(*(self._healthy(endpoint) for endpoint in model.endpoints)))

    async def close(self) -> None:
        await self._session.close()

    async def _healthy(self, endpoint: str) -> bool:
        try:
            async with self._session.get(f"{endpoint}/health", timeout=aiohttp.ClientTimeout(total=2)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


def in_turn(endpoints: tuple[str, ...], turn: int) -> tuple[str, ...]:
    """All endpoints, starting with another one each turn."""
    start = turn % len(endpoints)
    return endpoints[start:] + endpoints[:start]


def _headers(model: config.Model, request_id: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    if model.api_key is not None:
        headers["Authorization"] = f"Bearer {model.api_key.get_secret_value()}"
    return headers
