"""An upstream whose answers say what they are answers to: `python -m bench.scope_stub PORT [--wrong]`.

It speaks vLLM's protocol. An answer is three lines: what it is an answer to (a `Label`), text that no other answer has,
and how long both are, with a checksum. So whoever gets it can tell whether it is whole, and whose it is.

What a generation is like, or does wrong, is said by the end of its request's id, after the last "-", where nothing of
the request itself is changed: one of `KINDS`. With `--wrong` each tenth answer is one that the gateway cannot know to
be wrong: of another scope, or without its end.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LARGE = "large"  # the model that is busy, see `KINDS`
KINDS = {
    "plain": "a few words",
    "long": "two hundred chunks",
    "slow": "half a second, in pieces that end anywhere",
    "huge": "more than Milvus takes in one field",
    "length": "cut at the most tokens that it may have",
    "break": "the connection ends in the middle",
    "unended": "the stream ends without [DONE], other answers as `break`",
    "error": "vLLM's way to fail in the middle of a stream, other answers as `failed`",
    "failed": "status 500",
    "busy": "status 503 of the large model, for which another one then answers",
}
WORDS = {"long": 1200, "slow": 40}  # of the text; others have `FEW_WORDS`
FEW_WORDS = 12
HUGE_BYTES = 100_000  # that hardly get shorter when compressed
CHUNK_CHARACTERS = {"long": 40, "huge": 20_000}
PIECES = 8  # of what is slow
PAUSE_SECONDS = 0.06
EACH_WRONG = 10

Body = dict[str, Any]
FORM_FIELDS = {"stream", "stream_options", "user", "safety_identifier", "prompt_cache_key"}


@dataclass(frozen=True, slots=True)
class Label:
    """What an answer is an answer to."""

    scope: str  # see `scope`
    question: str  # digest of the last user turn's text
    by: str  # id of the request that it was generated for
    serial: int  # of the generation
    model: str
    at: float  # when it was begun, in seconds since the epoch


def scope(body: Body) -> str:
    """Digest of all that vLLM is asked but the wording of the last turn, and the form in which it is to answer."""
    *earlier, last = body["messages"]
    fields = {key: value for key, value in body.items() if key not in FORM_FIELDS | {"messages"}}
    around = {key: value for key, value in last.items() if key != "content"}
    return digest(json.dumps([fields, earlier, around], sort_keys=True))


def question(body: Body) -> str:
    """The text of the last turn."""
    content = body["messages"][-1]["content"]
    return (content if isinstance(content, str) else "\n".join(part["text"] for part in content)).strip()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def sealed(label: Label, text: str) -> str:
    """The answer."""
    said = f"{json.dumps(asdict(label))}\n{text}"
    return f"{said}\n{len(said)} {digest(said)}"


def opened(answer: str) -> Label | None:
    """What the answer is an answer to; None when it is not whole."""
    said, _, seal = answer.rpartition("\n")
    if seal != f"{len(said)} {digest(said)}":
        return None
    return Label(**json.loads(said.partition("\n")[0]))


def usage(answer: str) -> dict[str, int]:
    """That of the answer and no other."""
    tokens = len(answer)
    prompt = int(digest(answer)[:4], 16)
    return {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}


def kind_of(request_id: str) -> str:
    kind = request_id.rpartition("-")[2]
    return kind if kind in KINDS else "plain"


def text_of(kind: str, serial: int) -> str:
    """Of this length, and no other answer's."""
    chosen = random.Random(serial)  # noqa: S311 (nothing is secret)
    if kind == "huge":
        return chosen.randbytes(HUGE_BYTES // 2).hex()
    words = ("naïve", "glacier", "😀", "mortgage", "é", "penguin", "\\n", '"', "ночь", "wolf")
    return " ".join(chosen.choices(words, k=WORDS.get(kind, FEW_WORDS)))


class Stub:
    def __init__(self, *, wrong: bool = False) -> None:
        self._serials = count(1)
        self._wrong = wrong

    async def health(self, request: Request) -> Response:
        return Response()

    async def chat(self, request: Request) -> Response:
        body, request_id = json.loads(await request.body()), request.headers["x-request-id"]
        kind, serial, streams = kind_of(request_id), next(self._serials), bool(body.get("stream"))
        if kind == "failed" or (kind == "error" and not streams):
            return failure(500)
        if kind == "busy" and body["model"] == LARGE:
            return failure(503)
        label = Label(scope(body), digest(question(body)), request_id, serial, body["model"], time.time())
        answer = sealed(label, text_of(kind, serial))
        if self._wrong and serial % EACH_WRONG == 0:
            answer = sealed(Label(**{**asdict(label), "scope": digest("another")}), "") if serial % 20 else answer[:-9]
        if streams:
            return StreamingResponse(streamed(body, kind, answer), media_type="text/event-stream")
        if kind == "slow":
            await asyncio.sleep(PIECES * PAUSE_SECONDS)
        return whole(body, kind, answer)


def whole(body: Body, kind: str, answer: str) -> Response:
    message: Body = {"role": "assistant", "content": answer, "refusal": None, "tool_calls": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason(kind), "stop_reason": None}
    raw = json.dumps(
        {**envelope(body, "chat.completion", answer), "choices": [choice], "usage": usage(answer)}
    ).encode()
    if kind in ("break", "unended"):
        half = broken_off(raw[: len(raw) // 2])
        return StreamingResponse(half, media_type="application/json", headers={"content-length": str(len(raw))})
    return Response(raw, media_type="application/json")


async def streamed(body: Body, kind: str, answer: str) -> AsyncIterator[bytes]:
    found = list(frames(body, kind, answer))
    if kind == "slow":
        for piece in pieces(b"".join(found)):
            yield piece
            await asyncio.sleep(PAUSE_SECONDS)
        return
    for frame in found:
        yield frame
        await asyncio.sleep(0)
    if kind == "break":
        raise ConnectionResetError("the stub breaks off")


def pieces(raw: bytes) -> Iterator[bytes]:
    """In the middle of an event, or of a letter."""
    size = len(raw) // PIECES + 1
    yield from (raw[start : start + size] for start in range(0, len(raw), size))


def frames(body: Body, kind: str, answer: str) -> Iterator[bytes]:
    """The events of a stream, as far as it gets."""
    around, size = envelope(body, "chat.completion.chunk", answer), CHUNK_CHARACTERS.get(kind, 24)
    texts = [answer[start : start + size] for start in range(0, len(answer), size)]
    cut = kind in ("break", "error")
    yield event(chunk(around, {"role": "assistant", "content": ""}))
    for text in texts[: len(texts) // 2] if cut else texts:
        yield event(chunk(around, {"content": text}))
    if kind == "error":
        yield event({"error": {"message": "the engine died", "type": "InternalServerError", "code": 500}})
    if kind == "break":
        return
    if not cut:
        yield event(chunk(around, {}, reason(kind)))
        if (body.get("stream_options") or {}).get("include_usage"):
            yield event({**around, "choices": [], "usage": usage(answer)})
    if kind != "unended":
        yield b"data: [DONE]\n\n"


def reason(kind: str) -> str:
    return "length" if kind == "length" else "stop"


def envelope(body: Body, kind: str, answer: str) -> Body:
    return {
        "id": f"chatcmpl-{digest(answer)}",
        "object": kind,
        "created": int(time.time()),
        "model": body["model"],
    }


def chunk(around: Body, delta: Body, finish_reason: str | None = None) -> Body:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {**around, "choices": [choice]}


def event(payload: Body) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def broken_off(raw: bytes) -> AsyncIterator[bytes]:
    yield raw
    raise ConnectionResetError("the stub breaks off")


def failure(status: int) -> Response:
    return JSONResponse({"error": {"message": "the stub says no", "type": "stub", "code": status}}, status)


def create_app(stub: Stub) -> Starlette:
    return Starlette(routes=[Route("/v1/chat/completions", stub.chat, methods=["POST"]), Route("/health", stub.health)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.scope_stub", description=__doc__.partition("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--wrong", action="store_true")
    options = parser.parse_args()
    uvicorn.run(create_app(Stub(wrong=options.wrong)), host="127.0.0.1", port=options.port, log_level="critical")


if __name__ == "__main__":
    main()
