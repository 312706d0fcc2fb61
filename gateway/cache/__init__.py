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
    tenant: str  # who asked first, see `gateway.request.tenant`
    question: str
    embedding: Vector  # (dimension,), L2-normalised
    answer: Answer
    origin: Origin
    created_at: float  # seconds since the epoch
    expires_at: float

    @property
    def answer_key(self) -> str:
        """Of this answer: a later one to the same question has another. At most 64 characters."""
        return f"{self.key[:48]}-{int(self.created_at * 1000)}"


@dataclass(frozen=True, slots=True)
class Hit:
    entry: Entry
    similarity: float  # cosine


@dataclass(frozen=True, slots=True)
class Selection:
    """Entries for which all that is given is so; without anything given, all."""

    tenant: str | None = None
    model: str | None = None  # that gave the answer
    scope: str | None = None
    key: str | None = None

    def __contains__(self, entry: Entry) -> bool:
        return (
            self.tenant in (None, entry.tenant)
            and self.model in (None, entry.origin.model)
            and self.scope in (None, entry.scope)
            and self.key in (None, entry.key)
        )


class Cache(Protocol):
    async def get(self, key: str) -> Entry | None:
        """The unexpired entry of exactly this question and scope. Raises `CacheUnavailable`."""

    async def search(self, scope: str, embedding: Vector, floor: float) -> list[Hit]:
        """The few most similar unexpired entries of `scope` at or above `floor`, best first.

        Raises `CacheUnavailable`.
        """

    def used(self, key: str) -> None:
        """The entry was served: what eviction may go by."""

    def put(self, entry: Entry) -> None:
        """Remember `entry`, replacing one with its key; never waits."""

    async def delete(self, key: str) -> None:
        """Forget the entry, if there is one, at once. Raises `CacheUnavailable` when the backend may still have it."""

    async def purge(self, which: Selection) -> None:
        """Forget all of these at once, as `delete`."""

    async def count(self, which: Selection) -> int:
        """How many unexpired entries there are. Raises `CacheUnavailable`."""

    async def entries(self, prefix: str) -> list[Entry]:
        """Unexpired entries whose keys begin with this. Raises `CacheUnavailable`."""

    async def check(self) -> None:
        """Raises `CacheUnavailable` when the backend is not ready."""

    async def close(self) -> None:
        """Finish what is being written and let go of the backend."""
