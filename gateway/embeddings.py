"""Texts that Triton itself answers: their embeddings, and what the classifier reads in them; no I/O."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.cache import Vector
from gateway.config import EMBEDDER
from gateway.errors import BadRequest, UnknownModel
from gateway.request import BYTES_PER_TOKEN, Body, check_fields, decode, typed
from gateway.triton import MAX_CHARACTERS, Embedded, Reading

ENCODINGS = ("float", "base64")
EMBEDDING_FIELDS = ("dimensions", "encoding_format", "input", "model", "user")
CLASSIFY_FIELDS = ("input", "model")


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    texts: tuple[str, ...]
    encoding: str  # one of ENCODINGS


def parse_embeddings(raw: bytes, *, dimension: int, most: int) -> EmbeddingRequest:
    """Read the body of POST /v1/embeddings, of at most `most` texts; raises `BadRequest`, `UnknownModel`."""
    body = decode(raw)
    check_fields(body, EMBEDDING_FIELDS, "this request")
    model = typed(body, "model", str, "a string", required=True)
    if model != EMBEDDER:
        raise UnknownModel(f"the model {model[:100]!r} gives no embeddings (known: {EMBEDDER})", param="model")
    typed(body, "user", str, "a string")
    encoding = typed(body, "encoding_format", str, "a string")
    if encoding not in (None, *ENCODINGS):
        raise BadRequest(f"encoding_format must be {' or '.join(ENCODINGS)}", param="encoding_format")
    wanted = typed(body, "dimensions", int, "a whole number")
    if wanted not in (None, dimension):
        raise BadRequest(f"the embedder gives {dimension} dimensions, no other number", param="dimensions")
    texts = _texts(body, most)
    for i, text in enumerate(texts):
        if len(text) > MAX_CHARACTERS:
            raise _too_long(i)
    return EmbeddingRequest(texts, encoding or "float")


def parse_classify(raw: bytes, *, most: int) -> tuple[str, ...]:
    """Read the body of POST /v1/classify; raises `BadRequest` naming the field."""
    body = decode(raw)
    check_fields(body, CLASSIFY_FIELDS, "this request")
    typed(body, "model", str, "a string")
    return _texts(body, most)


def _texts(body: Body, most: int) -> tuple[str, ...]:
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        words = "is required" if given is None else "must be a string or a non-empty array of strings"
        raise BadRequest(f"input {words}", param="input")
    if len(texts) > most:
        raise BadRequest(f"input holds {len(texts)} texts; at most {most} are taken at once", param="input")
    for i, text in enumerate(texts):
        _check_text(text, "input" if isinstance(given, str) else f"input[{i}]")
    return tuple(texts)


def _check_text(text: object, path: str) -> None:
    if isinstance(text, int | list):
        raise BadRequest(f"{path} is not a string: tokens are not taken, send the text", param=path)
    if not isinstance(text, str):
        raise BadRequest(f"{path} is not a string", param=path)
    if not text.strip():
        raise BadRequest(f"{path} is empty", param=path)


def embedding_list(request: EmbeddingRequest, found: Sequence[Embedded]) -> bytes:
    """The body of the answer. Raises `BadRequest` when a text was not read to its end: it is not its embedding then."""
    for i, each in enumerate(found):
        if each.truncated:
            raise _too_long(i)
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(each.embedding, request.encoding)}
        for i, each in enumerate(found)
    ]
    count = tokens(request.texts)
    usage = {"prompt_tokens": count, "total_tokens": count}
    answer = {"object": "list", "data": data, "model": EMBEDDER, "usage": usage}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _too_long(i: int) -> BadRequest:
    return BadRequest(f"input[{i}] is longer than the embedder reads; send it in parts", param=f"input[{i}]")


def _encoded(vector: Vector, encoding: str) -> Vector | str:
    """As an array of numbers, or the bytes of its little-endian float32 in base64."""
    return vector if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()


def tokens(texts: Sequence[str]) -> int:
    """Estimated, as everywhere: known without a tokeniser."""
    return sum(max(1, len(text.encode()) // BYTES_PER_TOKEN) for text in texts)


def classification_list(readings: Sequence[Reading]) -> dict[str, Any]:
    data = [
        {
            "object": "classification",
            "index": i,
            "category": reading.category,
            "category_scores": reading.category_scores,
            "complexity": reading.complexity,
            "quality": reading.quality,
            "truncated": reading.truncated,
        }
        for i, reading in enumerate(readings)
    ]
    return {"object": "list", "data": data}
