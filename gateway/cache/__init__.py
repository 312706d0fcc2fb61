"""The semantic cache: answers found by exact question or by meaning, always within one scope.

`Cache` is what the gateway needs of a backend; `gateway.cache.memory` and `gateway.cache.milvus` are the two there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gateway.answer import Answer

Vector = NDArray[np.float32]


class CacheUnavailable(Exception):
    """The backend did not answer, or not in time. For a request this is a miss."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who answers a prompt, and why: what the response headers tell, on a miss and on every hit after it."""

    model: str  # the configured model
    rule: str  # of the policy
    category: str | None  # None: the prompt was not read
    complexity: float | None


@dataclass(frozen=True, slots=True)
class Entry:
    key: str  # digest of scope and question
    scope: str  # digest of all that may change the answer besides the question
    question: str
    embedding: Vector  # (dimension,), L2-normalised
    answer: Answer
    origin: Origin
    expires_at: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Hit:
    entry: Entry
    similarity: float  # cosine


class Cache(Protocol):
    async def get(self, key: str) -> Entry | None:
        """The unexpired entry of exactly this question and scope. Raises `CacheUnavailable`."""

    async def search(self, scope: str, embedding: Vector, threshold: float) -> Hit | None:
        """The most similar unexpired entry of `scope` at or above `threshold`. Raises `CacheUnavailable`."""

    def put(self, entry: Entry) -> None:
        """Remember `entry`, replacing one with its key; never waits."""

    async def delete(self, key: str) -> None:
        """Forget the entry, if there is one, at once. Raises `CacheUnavailable` when the backend may still have it."""

    async def check(self) -> None:
        """Raises `CacheUnavailable` when the backend is not ready."""

    async def close(self) -> None:
        """Finish what is being written and let go of the backend."""
