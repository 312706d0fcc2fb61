"""A complete answer, however it came (JSON or a stream) and however it is replayed; no I/O.

Only answers that are whole are made into an `Answer`: one choice, ended by the model itself. Of chat completions it may
also be calls of tools. Here is what all forms of the API share, and chat completions; `gateway.dialects` has the rest.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway import sse

MAX_ANSWER_CHARACTERS = 1024 * 1024  # a longer answer is passed on, not kept
MAX_STREAM_BYTES = 16 * MAX_ANSWER_CHARACTERS  # a chunk's envelope outweighs its text


@dataclass(frozen=True, slots=True)
class Answer:
    model: str  # as vLLM names it
    message: dict[str, Any]  # role, content and text beside it (reasoning, say), or as its form needs it
    finish_reason: str  # as its form calls the end that the model itself chose
    usage: dict[str, Any] | None


def from_completion(raw: bytes) -> Answer | None:
    """The answer in the body of a chat.completion; None when it is not whole."""
    match loaded(raw):
        case {"model": str(model), "choices": [{"message": dict(message), "finish_reason": str(reason)}], **rest}:
            return whole(model, telling(message), rest.get("usage"), reason) if reason in ENDS else None
    return None


def loaded(raw: bytes) -> object:
    """The value of a JSON text; None when it is none."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None


_ID = re.compile(rb'"id"\s*:\s*"([\w.:-]{1,200})"')


def response_id(payload: bytes) -> str | None:
    """The id in a body or in the first event of a stream: the first field of that name, in every form."""
    found = _ID.search(payload, 0, 4096)
    return found[1].decode() if found else None


def telling(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """The fields of a message or a delta that say something."""
    return {key: value for key, value in fields.items() if value not in (None, [], "")}


ENDS = ("stop", CALLS := "tool_calls")  # of chat completions, that the model itself chose


def whole(model: str, message: dict[str, Any], usage: object, finish_reason: str = "stop") -> Answer | None:
    """The answer when its message is text, or calls of tools, that may be kept."""
    calls = message.get(CALLS)
    texts = [value for key, value in message.items() if key != CALLS]
    if (finish_reason == CALLS) != bool(calls) or not (calls or message.get("content")):
        return None
    if not all(isinstance(value, str) for value in texts) or not _are_calls(calls or []):
        return None
    if sum(map(len, texts)) + len(orjson.dumps(calls)) > MAX_ANSWER_CHARACTERS:
        return None
    return Answer(model, {"role": "assistant", **message}, finish_reason, figures(usage))


def _are_calls(calls: object) -> bool:
    """Whether these are whole calls of functions."""
    if not isinstance(calls, list):
        return False
    for call in calls:
        match call:
            case {"id": str(), "function": {"name": str(), "arguments": str()}}:
                continue
        return False
    return True


def figures(usage: object) -> dict[str, Any] | None:
    """Usage as vLLM tells it: an object of numbers, and of objects and arrays of them; None when it is not."""
    return usage if isinstance(usage, dict) and _are_figures(usage, 3) else None


def _are_figures(value: object, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return isinstance(value, int | float | None)
    parts = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_are_figures(part, depth - 1) for part in parts)


class Assembly(ABC):
    """Puts an answer together from the events of a stream."""

    def __init__(self) -> None:
        self.done = False  # the end was seen
        self._size = 0
        self._spoilt = False

    def add(self, payload: bytes) -> None:
        """Take the payload of one event."""
        self._size += len(payload)
        self._spoilt = self._spoilt or self._size > MAX_STREAM_BYTES
        if payload == b"[DONE]":
            self.done = True
        elif payload and not self._spoilt:
            self._spoilt = not self._read(payload)

    def answer(self) -> Answer | None:
        """The answer; None when the stream was not whole."""
        return self._whole() if self.done and not self._spoilt else None

    def _read(self, payload: bytes) -> bool:
        event = loaded(payload)
        return isinstance(event, dict) and self._fold(event)

    @abstractmethod
    def _fold(self, event: dict[str, Any]) -> bool:
        """Add an event; False when the answer is not one that can be put together."""

    @abstractmethod
    def _whole(self) -> Answer | None:
        """The answer that the events make."""


class Unread(Assembly):
    """Of a stream that is not kept, whatever it says."""

    def add(self, payload: bytes) -> None:
        pass

    def _fold(self, event: dict[str, Any]) -> bool:
        return False

    def _whole(self) -> Answer | None:
        return None


class ChunkAssembly(Assembly):
    """Of chunks with choices: `delta` is what a choice adds to the message."""

    def __init__(self, delta: Callable[[dict[str, Any]], Any] = lambda choice: choice.get("delta")) -> None:
        super().__init__()
        self._delta = delta
        self._model: object = None
        self._message: dict[str, list[str]] = {}
        self._calls: list[dict[str, Any]] = []
        self._finish_reason: object = None
        self._usage: object = None

    def _whole(self) -> Answer | None:
        if not isinstance(self._finish_reason, str) or self._finish_reason not in ENDS:
            return None
        if not isinstance(self._model, str):
            return None
        message: dict[str, Any] = {key: "".join(pieces) for key, pieces in self._message.items()}
        if self._calls:
            message[CALLS] = self._calls
        return whole(self._model, message, self._usage, self._finish_reason)

    def _fold(self, chunk: dict[str, Any]) -> bool:
        if not isinstance(chunk.get("choices"), list):
            return False
        self._model = chunk.get("model", self._model)
        self._usage = chunk.get("usage") or self._usage
        return all(self._fold_choice(choice) for choice in chunk["choices"])

    def _fold_choice(self, choice: Any) -> bool:
        if not isinstance(choice, dict) or choice.get("index", 0) != 0:
            return False
        delta = self._delta(choice)
        if not isinstance(delta, dict):
            return False
        pieces = telling(delta)
        calls = pieces.pop(CALLS, [])
        if not all(isinstance(value, str) for value in pieces.values()):
            return False
        if (pieces or calls) and self._finish_reason:
            return False
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        for key, value in pieces.items():
            if key == "role":
                self._message[key] = [value]
            else:
                self._message.setdefault(key, []).append(value)
        return isinstance(calls, list) and all(map(self._fold_call, calls))

    def _fold_call(self, call: Any) -> bool:
        """Add a piece of a call: the first of each has its id and name, all have some of its arguments."""
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            return False
        index, said, arguments = call.get("index"), call["function"], call["function"].get("arguments") or ""
        if index == len(self._calls):
            beside = {key: value for key, value in call.items() if key not in ("index", "function")}
            self._calls.append({**beside, "function": {"name": said.get("name"), "arguments": ""}})
        if not isinstance(index, int) or not 0 <= index < len(self._calls) or not isinstance(arguments, str):
            return False
        self._calls[index]["function"]["arguments"] += arguments
        return True


def is_usage_only(payload: bytes) -> bool:
    """Whether an event is the usage chunk that `stream_options.include_usage` adds: no choices, only figures."""
    return b'"choices":[]' in payload.replace(b" ", b"") and b'"usage"' in payload


class Passing:
    """A stream as it goes to the client: all of it, or, where only the gateway asked for its usage, all but that.

    vLLM puts its `system_fingerprint` into the last chunk: of the answer when no usage follows, else of the usage. So
    the chunk that ends the answer is held until the next one comes.
    """

    def __init__(self, *, keep_usage: bool) -> None:
        self._keep_usage = keep_usage
        self._held = b""

    def feed(self, frame: bytes, payload: bytes) -> bytes:
        """What goes to the client now that this event has come."""
        if self._keep_usage:
            return frame
        held, self._held = self._held, b""
        if is_usage_only(payload):
            return _with_fingerprint(held, payload)
        if _ENDING.search(payload):
            self._held = frame
            return held
        return held + frame

    def flush(self) -> bytes:
        """What is held when the stream ends."""
        held, self._held = self._held, b""
        return held


_ENDING = re.compile(rb'"finish_reason":\s?"')
_FINGERPRINT = re.compile(rb',\s?"system_fingerprint":\s?"[^"\\]*"')


def _with_fingerprint(frame: bytes, usage: bytes) -> bytes:
    """The event with the fingerprint that the usage chunk names."""
    end, found = frame.rfind(b"}"), _FINGERPRINT.search(usage)
    return frame if found is None or end < 0 or _FINGERPRINT.search(frame) else frame[:end] + found[0] + frame[end:]


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one replay of an answer from another."""

    id: str
    created: int  # seconds since the epoch


def completion(answer: Answer, new: Identity) -> bytes:
    """The answer as the body of a chat.completion."""
    choice = {
        "index": 0,
        "message": {"content": None, **answer.message},
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }
    envelope = {"id": new.id, "object": "chat.completion", "created": new.created, "model": answer.model}
    return orjson.dumps({**envelope, "choices": [choice], "usage": answer.usage})


def events(answer: Answer, new: Identity, include_usage: bool) -> bytes:
    """The answer as a stream: a chunk with the role, one with the text, one with the end, then usage if wanted."""
    text = {key: value for key, value in answer.message.items() if key not in ("role", CALLS)}
    if calls := answer.message.get(CALLS):
        text[CALLS] = [{"index": i, **call} for i, call in enumerate(calls)]
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
