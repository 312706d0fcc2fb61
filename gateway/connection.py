"""One client's connection: uvicorn's HTTP/1.1 over httptools, bounded in what a slow or greedy client can hold.

    headers too many or too long          431, as for what frames a body: trailers, extensions of chunks
    a request that does not arrive whole  408
    not HTTP/1.1                          400
    a client that does not read           nothing more is taken from the model; after a while the connection is let go

These requests never reach the application. Each such end of a connection is counted, by its reason. A request to go on
in another protocol is served as one without that wish.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.config import Listen
from gateway.errors import openai_form

LINGER_SECONDS = 1.0  # for a client that still sends to read why nobody listens; closing at once could lose the answer


class HeadTooLarge(Exception):
    """More headers, or longer ones, than `listen` allows."""


def connections(listen: Callable[[], Listen], is_draining: Callable[[], bool]) -> Callable[..., Connection]:
    """What uvicorn makes its connections with; `listen` says what holds for a new one."""
    return lambda *arguments, **named: Connection(listen(), *arguments, is_last=is_draining(), **named)


class Connection(HttpToolsProtocol):
    def __init__(self, listen: Listen, *arguments: Any, is_last: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._listen = listen
        self._in_head = False  # a head has begun whose end has not arrived
        self._head_bytes = 0  # that came after the piece in which the head began, or the body last went on
        self._whole = False  # the last request has arrived, body and all
        self._refused = False
        self._last = is_last  # the next answer is the connection's last
        self._answered: RequestResponseCycle | None = None  # `cycle` may be of a later request, which waits
        self._arriving: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.resume_writing()
        if self._answered is not None:
            self._tell(self._answered)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            self._parse(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the latter is of CONNECT
            if not self._refused:
                self._refuse(400, "invalid_http", "the request is not valid HTTP/1.1")
        if self._head_bytes > self._listen.max_header_bytes and not (self._whole or self._refused):
            self._refuse_head()
        if self._whole:
            self._stop_waiting()
            self._keep_alive()
        elif self._arriving is None and not self._refused:
            self._await_request()

    def _parse(self, data: bytes) -> None:
        """A head that asks for another protocol is read again without that; a server may ignore it (RFC 9110, 7.8)."""
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:  # the parser has left out the body
                rest = rest[upgrade.args[0] :]
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)  # after a `close` the old one would read no further
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
                self.parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes:
        begin = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join([begin, *fields, b"", b""])

    # What the parser finds

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._whole = True, 0, False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are nobody's
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > self._listen.max_headers or size > self._listen.max_header_bytes:
            self._refuse_head()
            raise HeadTooLarge  # ends the parsing
        if self.parser.should_upgrade():
            return  # `_parse` has it read again
        super().on_headers_complete()
        self._in_head = False
        if self._last:
            self.cycle.keep_alive = False
        if len(self.pipeline) == 1:
            self.flow.resume_reading()  # until a second one waits: a client that leaves is not seen without reading

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._whole = True
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    # The answer

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.expect_100_continue and not self._whole:
            self.transport.close()  # whether a body follows or another request, nobody can tell
        if self.transport.is_closing():
            self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_reader()

    def pause_writing(self) -> None:
        """More waits to be read than the transport should hold; the application waits, too, until there is room."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    # Time

    def _await_request(self) -> None:
        self._arriving = self.loop.call_later(self._listen.body_timeout_seconds, self._late)

    def _stop_waiting(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _await_reader(self) -> None:
        if self._stuck is None and self.transport.get_write_buffer_size():
            self._stuck = self.loop.call_later(self._listen.write_timeout_seconds, self._abandon, "not_read")

    def _late(self) -> None:
        """The request is not whole in time."""
        self._arriving = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or self.pipeline or (answering and self._in_head):
            self._await_request()  # not the client's fault: it is this side that reads no further
        elif answering and self.cycle.response_started:
            self._abandon("slow_request")
        elif not (self._in_head or answering):
            self.transport.close()  # nothing was asked, or what was asked has its answer
        else:
            seconds = self._listen.body_timeout_seconds
            self._refuse(408, "request_timeout", f"the request did not arrive whole in {seconds:g} seconds")

    def _keep_alive(self) -> None:
        """uvicorn forgets its own timer when the rest of a body arrives after its answer."""
        idle = self.cycle is not None and self.cycle.response_complete and not self.transport.is_closing()
        if idle and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # The end

    @property
    def is_busy(self) -> bool:
        """Whether a request is arriving or being answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        return answering or self._in_head

    def shutdown(self) -> None:
        """The gateway is about to end: the answer under way, or else one more, is the last, and says so."""
        self._last = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _refuse_head(self) -> None:
        most, size = self._listen.max_headers, self._listen.max_header_bytes
        self._refuse(431, "headers_too_large", f"more than {most} headers, or more than {size} bytes of them")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Say why, and close. A client that is just being answered, or has its answer, only sees the end."""
        self._refused = True
        self._stop_waiting()
        if self._may_not_answer():
            self._abandon(code)
            return
        self._count(code)
        body = orjson.dumps(openai_form(message, "invalid_request_error", code=code))
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        if self.cycle is not None:
            self._tell(self.cycle)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _may_not_answer(self) -> bool:
        """Whether what would be written now came into an earlier request's answer, or after this one's."""
        if self.cycle is None:
            return False
        if self._in_head:
            return not self.cycle.response_complete
        return self.cycle.response_started or bool(self.pipeline)

    def _tell(self, cycle: RequestResponseCycle) -> None:
        """Have the application, which waits for the rest or generates, know that nobody is there."""
        cycle.disconnected = True
        cycle.message_event.set()

    def _abandon(self, reason: str) -> None:
        self._count(reason)
        self.transport.abort()

    def _count(self, reason: str) -> None:
        self.app_state["metrics"].ended.labels(reason).inc()
