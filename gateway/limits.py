"""How much a body may hold, looked at before it is parsed and after; no I/O."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from gateway.config import Listen
from gateway.errors import BadRequest

MAX_VALUES = 250_000  # parsed, each takes many times the bytes it has in the body
MAX_MODEL_CHARACTERS = 200  # as long as a configured name may be
MAX_METADATA_BYTES = 16 * 1024
LISTS = ("messages", "input")  # what a conversation or a batch is in, depending on the API

_OPEN, _CLOSE, _SEPARATORS = b"[{", b"]}", b"[{,"
_STEPS = np.array([(byte in _OPEN) - (byte in _CLOSE) for byte in range(256)], dtype=np.int8)  # byte -> deeper by
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"' + _OPEN + _CLOSE + b","))


def check_raw(raw: bytes | bytearray, listen: Listen) -> None:
    """Refuse, before anything parses it, what is nested too deeply or holds too much. Raises `BadRequest`."""
    if _count(raw, _OPEN) <= listen.max_nesting and _count(raw, _SEPARATORS) <= MAX_VALUES:
        return  # even if none of them were in strings
    found = structure(raw)
    if nesting(found) > listen.max_nesting:
        raise BadRequest(f"the body is nested more than {listen.max_nesting} deep")
    if _count(found, _SEPARATORS) > MAX_VALUES:
        raise BadRequest(f"the body holds more than {MAX_VALUES} values")


def check(body: dict[str, Any], listen: Listen) -> None:
    """Raises `BadRequest` naming the field that is too long."""
    model = body.get("model")
    if isinstance(model, str) and len(model) > MAX_MODEL_CHARACTERS:
        raise BadRequest(f"model is longer than {MAX_MODEL_CHARACTERS} characters", param="model")
    for key in LISTS:
        if isinstance(body.get(key), list) and len(body[key]) > listen.max_messages:
            raise BadRequest(f"{key} holds more than {listen.max_messages} elements", param=key)
    if "metadata" in body and len(orjson.dumps(body["metadata"])) > MAX_METADATA_BYTES:
        raise BadRequest(f"metadata is longer than {MAX_METADATA_BYTES} bytes", param="metadata")


def structure(raw: bytes | bytearray) -> bytes:
    """The brackets and commas of a JSON text that are not in its strings. Of a text that is not JSON, whatever."""
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(unescaped.translate(None, _NOT_STRUCTURE).split(b'"')[::2])


def nesting(found: bytes) -> int:
    """How deep the brackets in a `structure` go."""
    steps = _STEPS[np.frombuffer(found, dtype=np.uint8)]  # (len(found),)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _count(raw: bytes | bytearray, characters: bytes) -> int:
    return sum(raw.count(character) for character in characters)
