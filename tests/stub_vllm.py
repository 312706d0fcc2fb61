"""A stub that speaks vLLM's protocol and can be told to fail.

`python tests/stub_vllm.py PORT [CERTIFICATE KEY AUTHORITY]`

Its answers name the generation's number, the model and the last user turn, so that a replay, a mix-up or a second
generation shows. `POST /stub` sets what the next generations do wrong, or what they say to the byte (`script`);
`GET /stub` tells what was received.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

if __name__ == "__main__":  # a file, not a module of tests
    sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import stub_forms

FAULTS = {
    "none",
    "status-400",
    "status-401",
    "status-429",
    "status-500",
    "status-503",
    "silent",  # it takes the request and says nothing
    "drop",  # the connection ends after the head of the answer
    "error-first",  # a stream whose first event is vLLM's 503
    "unhealthy",  # only /health says so
    "length",  # cut by max_tokens
    "tool-call",
    "break",  # the connection ends in the middle of the answer
    "no-done",  # the stream ends without [DONE]
    "error-event",  # vLLM's way to fail in the middle of a stream
    "bytes",  # a healthy stream, one byte at a time
    "slow",  # a healthy answer, a tenth of a second between pieces
    "endless",  # a stream that never ends
    "flood",  # a stream of megabytes, as fast as they are taken
    "headers",  # an answer with headers that are nobody else's business
}


class Stub:
    def __init__(self) -> None:
        self.fault = "none"
        self.retry_after: str | None = None  # sent with the statuses above
        self.script: dict[str, Any] | None = None  # content_type and the pieces of the next answers
        self.received: list[dict[str, Any]] = []
        self.abandoned = 0
        self.flooded = 0  # bytes

    async def control(self, request: Request) -> Response:
        if request.method == "POST":
            wanted = await request.json()
            self.fault, self.retry_after = wanted["fault"], wanted.get("retry_after")
            self.script = wanted.get("script")
            assert self.fault in FAULTS, self.fault
        return JSONResponse({"received": self.received, "abandoned": self.abandoned, "flooded": self.flooded})

    async def health(self, request: Request) -> Response:
        return Response(status_code=503 if self.fault == "unhealthy" else 200)

    async def silence(self, request: Request) -> Response:
        """Until the client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.abandoned += 1
        return Response()

    async def chat(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.received.append({"path": request.url.path, "body": body, "headers": dict(request.headers)})
        if self.script is not None:
            return StreamingResponse(played(self.script["pieces"]), media_type=self.script["content_type"])
        if (failure := await self.failure(request, body)) is not None:
            return failure
        if request.url.path in stub_forms.PATHS:
            return self.other_form(request.url.path, body)
        text = f"generation {len(self.received)} by {body['model']}: {question(body)} — naïve 😀"
        if body.get("stream"):
            return StreamingResponse(self.stream(body, text), media_type="text/event-stream")
        return await self.whole(request, body, text)

    async def failure(self, request: Request, body: dict[str, Any]) -> Response | None:
        """What is answered instead of a generation."""
        if self.fault.startswith("status-"):
            status = int(self.fault.removeprefix("status-"))
            headers = {"retry-after": self.retry_after} if self.retry_after is not None else {}
            return JSONResponse({"error": {"message": "stub says no", "type": "stub", "code": status}}, status, headers)
        if self.fault == "flood":
            return StreamingResponse(self.flood(body), media_type="text/event-stream")
        if self.fault == "headers":
            return Response(b'{"id": "x"}', media_type="application/json", headers=HOSTILE)
        if self.fault == "silent":
            return await self.silence(request)
        if self.fault == "drop":
            return StreamingResponse(broken(b""), media_type="text/event-stream", headers={"content-length": "99"})
        return None

    async def flood(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Counted before it is sent: what is counted has left for the gateway, but for one piece."""
        frame = sse(chunk(body, {"content": "x" * 65_536}, None))
        try:
            while True:
                self.flooded += len(frame)
                yield frame
                await asyncio.sleep(0)  # a reader as fast as this would leave nobody else a turn
        finally:
            self.abandoned += 1

    def other_form(self, path: str, body: dict[str, Any]) -> Response:
        form = stub_forms.FORMS[path]
        text = f"generation {len(self.received)} by {body['model']}: {form.question(body)} — naïve 😀"
        if body.get("stream"):
            frames = stub_forms.frames(path, body, text, self.fault)
            cut = [byte.to_bytes() for frame in frames for byte in frame] if self.fault == "bytes" else frames
            return StreamingResponse(
                broken(*cut) if self.fault == "break" else played(cut), media_type="text/event-stream"
            )
        raw = json.dumps(form.whole(body, text, self.fault), ensure_ascii=False).encode()
        if self.fault == "break":
            return StreamingResponse(broken(raw[: len(raw) // 2]), headers={"content-length": str(len(raw))})
        return Response(raw, media_type="application/json")

    async def whole(self, request: Request, body: dict[str, Any], text: str) -> Response:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
        reason = REASONS.get(self.fault, "stop")
        if self.fault == "tool-call":
            message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        if self.fault == "slow":
            await asyncio.sleep(0.5)
            self.abandoned += await request.is_disconnected()
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        answer = {**envelope(body, "chat.completion"), "choices": [choice], "usage": USAGE}
        raw = json.dumps(answer, ensure_ascii=False).encode()
        if self.fault == "break":
            return StreamingResponse(broken(raw[: len(raw) // 2]), headers={"content-length": str(len(raw))})
        return Response(raw, media_type="application/json")

    async def stream(self, body: dict[str, Any], text: str) -> AsyncIterator[bytes]:
        finished = False
        try:
            for frame in self.frames(body, text):
                for piece in [frame[i : i + 1] for i in range(len(frame))] if self.fault == "bytes" else [frame]:
                    yield piece
                if self.fault in ("slow", "endless"):
                    await asyncio.sleep(0.1)
            while self.fault == "endless":
                yield sse(chunk(body, {"content": "."}, None))
                await asyncio.sleep(0.02)
            finished = True
        finally:
            self.abandoned += not finished
        if self.fault == "break":
            raise ConnectionResetError("the stub breaks off")

    def frames(self, body: dict[str, Any], text: str) -> list[bytes]:
        if self.fault == "error-first":
            return [sse({"error": {"message": "engine is gone", "code": 503}}), b"data: [DONE]\n\n"]
        deltas: list[dict[str, Any]] = [{"content": text[i : i + 7]} for i in range(0, len(text), 7)]
        if self.fault == "tool-call":
            deltas = [{"tool_calls": [{"index": 0, **CALL}]}]
        frames = [sse(chunk(body, {"role": "assistant", "content": ""}, None))]
        frames += [sse(chunk(body, delta, None)) for delta in deltas]
        if self.fault in ("break", "endless"):
            return frames[:3]
        if self.fault == "error-event":
            return [*frames[:3], sse({"error": {"message": "engine died", "code": 500}}), b"data: [DONE]\n\n"]
        frames.append(sse(chunk(body, {}, REASONS.get(self.fault, "stop"))))
        if (body.get("stream_options") or {}).get("include_usage"):
            frames.append(sse({**envelope(body, "chat.completion.chunk"), "choices": [], "usage": USAGE}))
        return frames if self.fault == "no-done" else [*frames, b"data: [DONE]\n\n"]


HOSTILE = {
    "connection": "x-secret",
    "keep-alive": "timeout=5",
    "proxy-authenticate": "Basic",
    "x-secret": "hop",
    "set-cookie": "session=1",
    "authorization": "Bearer upstream-secret",
    "x-fingerpost-model": "another",
    "x-request-id": "another",
    "x-ratelimit-remaining-requests": "5",
    "server": "another",
    "retry-after": "7",
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
REASONS = {"length": "length", "tool-call": "tool_calls"}  # why an answer ends, by the fault
USAGE = {"prompt_tokens": 11, "total_tokens": 31, "completion_tokens": 20}


def question(body: dict[str, Any]) -> str:
    contents = (message["content"] for message in reversed(body["messages"]) if message["role"] == "user")
    content = next(contents, "")
    return content if isinstance(content, str) else " ".join(str(part.get("text", "")) for part in content)


def envelope(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-stub", "object": kind, "created": int(time.time()), "model": body["model"]}


def chunk(body: dict[str, Any], delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {**envelope(body, "chat.completion.chunk"), "choices": [choice]}


def sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def played(pieces: list[Any]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece if isinstance(piece, bytes) else piece.encode()
        await asyncio.sleep(0)


async def broken(*raw: bytes) -> AsyncIterator[bytes]:
    for piece in raw:
        yield piece
    raise ConnectionResetError("the stub breaks off")


def create_app(stub: Stub) -> Starlette:
    return Starlette(
        routes=[
            *(Route(path, stub.chat, methods=["POST"]) for path in ("/v1/chat/completions", *stub_forms.PATHS)),
            Route("/stub", stub.control, methods=["GET", "POST"]),
            Route("/health", stub.health),
        ]
    )


def tls(files: list[str]) -> dict[str, Any]:
    """Certificate, key, and the authority whose certificates clients must show."""
    if not files:
        return {}
    named = dict(zip(("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"), files, strict=True))
    return {**named, "ssl_cert_reqs": ssl.CERT_REQUIRED}


if __name__ == "__main__":
    uvicorn.run(create_app(Stub()), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical", **tls(sys.argv[2:]))
