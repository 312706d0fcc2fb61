"""A complete answer, however it came (JSON or a stream) and however it is replayed; no I/O.

Only answers that are whole are made into an `Answer`: one choice, ended by the model itself, text and no tool calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from gateway import sse

MAX_ANSWER_CHARACTERS = 1024 * 1024  # a longer answer is passed on, not kept


@dataclass(frozen=True, slots=True)
class Answer:
    model: str  # as vLLM names it
    message: dict[str, Any]  # role, content and whatever text fields came with them (reasoning, say)
    finish_reason: str
    usage: dict[str, Any] | None


def from_completion(raw: bytes) -> Answer | None:
    """The answer in the body of a chat.completion; None when it is not whole."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    match body:
        case {"model": str(model), "choices": [{"message": dict(message), "finish_reason": "stop"}]}:
            return _whole(model, _telling(message), body.get("usage"))
    return None


def _telling(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a message or a delta that say something."""
    return {key: value for key, value in fields.items() if value not in (None, [], "")}


def _whole(model: str, message: dict[str, Any], usage: object) -> Answer | None:
    if not message.get("content") or not all(isinstance(value, str) for value in message.values()):
        return None
    if sum(map(len, message.values())) > MAX_ANSWER_CHARACTERS:
        return None
    return Answer(model, {"role": "assistant", **message}, "stop", _figures(usage))


def _figures(usage: object) -> dict[str, Any] | None:
    """Usage as vLLM tells it: an object of numbers, or of objects of numbers; None when it is not."""
    if not isinstance(usage, dict):
        return None
    parts = [value for value in usage.values() if isinstance(value, dict)]
    figures = [value for value in usage.values() if not isinstance(value, dict)]
    figures += [value for part in parts for value in part.values()]
    return usage if all(isinstance(value, int | float | None) for value in figures) else None


class Assembly:
    """Puts an answer together from the events of a stream."""

    def __init__(self) -> None:
        self._model: object = None
        self._message: dict[str, list[str]] = {}
        self._finish_reason: object = None
        self._usage: object = None
        self._size = 0
        self.done = False  # the end was seen
        self._spoilt = False

    def add(self, payload: bytes) -> None:
        """Take the payload of one event."""
        self._size += len(payload)
        self._spoilt = self._spoilt or self._size > 16 * MAX_ANSWER_CHARACTERS  # a chunk's envelope outweighs its text
        if payload == b"[DONE]":
            self.done = True
        elif payload and not self._spoilt:
            self._spoilt = not self._fold(payload)

    def answer(self) -> Answer | None:
        """The answer; None when the stream was not whole."""
        if self._spoilt or not self.done or self._finish_reason != "stop" or not isinstance(self._model, str):
            return None
        return _whole(self._model, {key: "".join(pieces) for key, pieces in self._message.items()}, self._usage)

    def _fold(self, payload: bytes) -> bool:
        """Add a chunk; False when the answer is not one that can be put together."""
        try:
            chunk = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return False
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            return False
        self._model = chunk.get("model", self._model)
        self._usage = chunk.get("usage") or self._usage
        return all(self._fold_choice(choice) for choice in chunk["choices"])

    def _fold_choice(self, choice: Any) -> bool:
        if not isinstance(choice, dict) or choice.get("index", 0) != 0 or not isinstance(choice.get("delta"), dict):
            return False
        pieces = _telling(choice["delta"])
        if not all(isinstance(value, str) for value in pieces.values()) or (pieces and self._finish_reason):
            return False
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        for key, value in pieces.items():
            if key == "role":
                self._message[key] = [value]
            else:
                self._message.setdefault(key, []).append(value)
        return True


def is_usage_only(payload: bytes) -> bool:
    """Whether an event is the usage chunk that `stream_options.include_usage` adds: no choices, only figures."""
    return b'"choices":[]' in payload.replace(b" ", b"") and b'"usage"' in payload


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one replay of an answer from another."""

    id: str
    created: int  # seconds since the epoch


def completion(answer: Answer, new: Identity) -> bytes:
    """The answer as the body of a chat.completion."""
    choice = {"index": 0, "message": answer.message, "logprobs": None, "finish_reason": answer.finish_reason}
    envelope = {"id": new.id, "object": "chat.completion", "created": new.created, "model": answer.model}
    return orjson.dumps({**envelope, "choices": [choice], "usage": answer.usage})


def events(answer: Answer, new: Identity, *, include_usage: bool) -> bytes:
    """The answer as a stream: a chunk with the role, one with the text, one with the end, then usage if wanted."""
    text = {key: value for key, value in answer.message.items() if key != "role"}
    deltas = [({"role": "assistant", "content": ""}, None), (text, None), ({}, answer.finish_reason)]
    envelope = {
        "id": new.id,
        "object": "chat.completion.chunk",
        "created": new.created,
        "model": answer.model,
    }
    chunks: list[dict[str, Any]] = [
        {**envelope, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        for delta, reason in deltas
    ]
    if include_usage:
        chunks.append({**envelope, "choices": [], "usage": answer.usage})
    return b"".join(sse.event(orjson.dumps(chunk)) for chunk in chunks) + sse.DONE
