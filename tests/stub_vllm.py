"""A stub that speaks vLLM's protocol and can be told to fail: `python tests/stub_vllm.py PORT`.

Its answers name the generation's number, the model and the last user turn, so that a replay, a mix-up or a second
generation shows. `POST /stub` sets what the next generations do wrong; `GET /stub` tells what was received.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FAULTS = {
    "none",
    "status-400",
    "status-500",
    "length",  # cut by max_tokens
    "tool-call",
    "break",  # the connection ends in the middle of the answer
    "no-done",  # the stream ends without [DONE]
    "error-event",  # vLLM's way to fail in the middle of a stream
    "bytes",  # a healthy stream, one byte at a time
    "slow",  # a healthy answer, a tenth of a second between pieces
    "endless",  # a stream that never ends
}


class Stub:
    def __init__(self) -> None:
        self.fault = "none"
        self.received: list[dict[str, Any]] = []
        self.abandoned = 0

    async def control(self, request: Request) -> Response:
        if request.method == "POST":
            self.fault = (await request.json())["fault"]
            assert self.fault in FAULTS, self.fault
        return JSONResponse({"received": self.received, "abandoned": self.abandoned})

    async def health(self, request: Request) -> Response:
        return Response()

    async def chat(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.received.append({"body": body, "headers": dict(request.headers)})
        if self.fault.startswith("status-"):
            status = int(self.fault.removeprefix("status-"))
            return JSONResponse({"error": {"message": "stub says no", "type": "stub", "code": status}}, status)
        text = f"generation {len(self.received)} by {body['model']}: {question(body)} — naïve 😀"
        if body.get("stream"):
            return StreamingResponse(self.stream(body, text), media_type="text/event-stream")
        return await self.whole(request, body, text)

    async def whole(self, request: Request, body: dict[str, Any], text: str) -> Response:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
        reason = "length" if self.fault == "length" else "stop"
        if self.fault == "tool-call":
            call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
            message, reason = {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
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
        pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
        frames = [sse(chunk(body, {"role": "assistant", "content": ""}, None))]
        frames += [sse(chunk(body, {"content": piece}, None)) for piece in pieces]
        if self.fault in ("break", "endless"):
            return frames[:3]
        if self.fault == "error-event":
            return [*frames[:3], sse({"error": {"message": "engine died", "code": 500}}), b"data: [DONE]\n\n"]
        frames.append(sse(chunk(body, {}, "length" if self.fault == "length" else "stop")))
        if (body.get("stream_options") or {}).get("include_usage"):
            frames.append(sse({**envelope(body, "chat.completion.chunk"), "choices": [], "usage": USAGE}))
        return frames if self.fault == "no-done" else [*frames, b"data: [DONE]\n\n"]


USAGE = {"prompt_tokens": 11, "total_tokens": 31, "completion_tokens": 20}


def question(body: dict[str, Any]) -> str:
    content = next(message["content"] for message in reversed(body["messages"]) if message["role"] == "user")
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def envelope(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-stub", "object": kind, "created": int(time.time()), "model": body["model"]}


def chunk(body: dict[str, Any], delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {**envelope(body, "chat.completion.chunk"), "choices": [choice]}


def sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def broken(raw: bytes) -> AsyncIterator[bytes]:
    yield raw
    raise ConnectionResetError("the stub breaks off")


def create_app() -> Starlette:
    stub = Stub()
    return Starlette(
        routes=[
            Route("/v1/chat/completions", stub.chat, methods=["POST"]),
            Route("/stub", stub.control, methods=["GET", "POST"]),
            Route("/health", stub.health),
        ]
    )


if __name__ == "__main__":
    uvicorn.run(create_app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical")
