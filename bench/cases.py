"""What is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IN_FLIGHT = (1, 16, 64)
STREAMS = 64

STUB, LITELLM, PLAIN, CACHING, TRITON = "stub", "litellm", "gateway-plain", "gateway-caching", "triton"
NAMED, AUTO = "smollm2-small", "auto"  # of config/config.yaml

Texts = Literal["new", "one", "wordings"]


@dataclass(frozen=True, slots=True)
class Case:
    """Requests of one kind to one server."""

    name: str  # for --only, and in the JSON
    words: str  # in the table
    server: str
    model: str  # asked for
    texts: Texts  # `new`: no two alike; `one`: the same again; `wordings`: of what was asked before
    outcome: str | None = None  # what x-fingerpost-cache must say; None: not a gateway


CASES = (
    Case("stub", "stub, directly", STUB, NAMED, "one"),
    Case("litellm", "LiteLLM, named model", LITELLM, NAMED, "one"),
    Case("named", "gateway, named model, no cache", PLAIN, NAMED, "one", "bypass"),
    Case("triton", "Triton's `router`, directly", TRITON, AUTO, "new"),
    Case("miss", "gateway, `auto`, miss", CACHING, AUTO, "new", "miss"),
    Case("semantic", "gateway, `auto`, hit by meaning", CACHING, AUTO, "wordings", "hit-semantic"),
    Case("exact", "gateway, `auto`, exact hit", CACHING, AUTO, "one", "hit-exact"),
)
STREAM_SERVERS = {STUB: "stub, directly", LITELLM: "LiteLLM, named model", PLAIN: "gateway, named model, no cache"}
STREAMS_NAME = "streams"  # for --only
