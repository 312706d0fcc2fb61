"""Entries that no one asked for, alike those of a gateway: many scopes of very different sizes, questions on the same
topics, a fifth of them near others of their scope.

Topics and noise are drawn evenly from all directions, so no two topics are near and a topic's questions are apart in
all 384 dimensions. Real embeddings lie closer together than that, in fewer dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gateway.answer import Answer
from gateway.cache import Entry, Origin, Vector

SEED = 4
DIMENSION = 384
LARGEST = 0.1  # share of the entries that the largest scope has
TO_TOPIC = 0.65  # cosine of a question and its topic: two of a topic are about 0.42 apart, two of others 0
COPIES = 0.2  # share of the entries that are a rewording of another one of their scope
NEAR = (0.85, 0.98)  # cosine of a rewording
NEW = 0.2  # share of the questions asked that are no rewording
SMALL_SCOPES = 50  # a small scope has too few entries to ask about it often
TTL_SECONDS = 7 * 86400
PIECE = 50_000  # entries whose vectors are drawn at once
_WORDS = "the cache answers what has been asked before from a store of vectors while routing sends new prompts onward "

Vectors = NDArray[np.float32]
Numbers = NDArray[np.int64]
Dice = np.random.Generator


@dataclass(frozen=True, slots=True)
class Question:
    scope: int
    vector: Vector


def scopes_for(count: int) -> int:
    return max(100, count // 64)  # the smallest then have ten entries or fewer


def scope_sizes(count: int, scopes: int) -> Numbers:
    """Zipf: proportional to a power of the rank, the one with which the largest has its share. (scopes,), falling."""
    ranks = np.arange(1, scopes + 1, dtype=np.float64)
    low, high = 0.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 / (ranks**-middle).sum() < LARGEST else (low, middle)
    ends = np.rint(count * np.cumsum(ranks**-low) / (ranks**-low).sum()).astype(np.int64)
    return np.diff(ends, prepend=0)


class Population:
    """`count` entries in the order in which they came; drawn a piece at a time, always the same ones."""

    def __init__(self, count: int, scopes: int | None = None) -> None:
        self.count = count
        self._dice = np.random.default_rng(SEED)
        self.sizes = scope_sizes(count, scopes or scopes_for(count))
        self.scope_of = self._dice.permutation(np.repeat(np.arange(len(self.sizes)), self.sizes))  # (count,)
        self.topics = _directions(self._dice, max(32, count // 500))
        self._now = time.time()

    def pieces(self, words: str) -> Iterator[tuple[int, Vectors]]:
        """The number of the first entry of each piece, and the vectors of the piece."""
        with tqdm(total=self.count, desc=words, unit="entry", unit_scale=True, mininterval=1) as bar:
            for start in range(0, self.count, PIECE):
                vectors = self.vectors(self.scope_of[start : start + PIECE])
                yield start, vectors
                bar.update(len(vectors))

    def vectors(self, scope_of: Numbers) -> Vectors:
        """Of new entries, whose scopes are given; a fifth are near another one of these and of their scope."""
        found = self._on_topic(len(scope_of))
        copies, sources = _copies(self._dice, scope_of)
        found[copies] = self._near(found[sources])
        return found

    def questions(self, vectors: Vectors, scopes: Sequence[int], wanted: int) -> list[Question]:
        """Asked in these scopes: rewordings of what is there, and new ones."""
        members = {scope: np.flatnonzero(self.scope_of[: len(vectors)] == scope) for scope in scopes}
        asked = [int(scope) for scope in self._dice.choice([s for s in scopes if len(members[s])], wanted)]
        found = self._on_topic(wanted)
        old = np.flatnonzero(self._dice.random(wanted) >= NEW)
        found[old] = self._near(vectors[[self._dice.choice(members[asked[i]]) for i in old]])
        return [Question(scope, vector) for scope, vector in zip(asked, found, strict=True)]

    def tiers(self) -> dict[str, list[int]]:
        """Scopes of ten entries or so, some of about the root of all, and the largest."""
        apart = np.abs(np.log(self.sizes / 10.0, where=self.sizes > 0, out=np.full(len(self.sizes), np.inf)))
        middle = np.abs(np.log(np.maximum(self.sizes, 1) / self.count**0.5))
        return {
            "small": np.argsort(apart, kind="stable")[:SMALL_SCOPES].tolist(),
            "middle": np.argsort(middle, kind="stable")[: SMALL_SCOPES // 10].tolist(),
            "largest": [0],
        }

    def entry(self, number: int, vector: Vector, scope: int | None = None) -> Entry:
        at = (number * 7919) % (len(_TEXT) - 1000)
        long = 300 + (number * 104_729) % 600  # characters of the answer: 600 on average
        message = {"role": "assistant", "content": _TEXT[at : at + long]}
        usage = {"prompt_tokens": 24, "completion_tokens": long // 5, "total_tokens": 24 + long // 5}
        return Entry(
            key=key(number),
            scope=scope_name(int(self.scope_of[number]) if scope is None else scope),
            tenant="bench",
            question=f"{number}: {_TEXT[at + long : at + long + 60]}?",
            embedding=vector,
            answer=Answer("small", message, "stop", usage),
            origin=Origin("small", "default", "other", 0.4),
            created_at=self._now,
            expires_at=self._now + TTL_SECONDS,
        )

    def _on_topic(self, count: int) -> Vectors:
        topics = self.topics[self._dice.integers(len(self.topics), size=count)]
        return _toward(topics, TO_TOPIC, self._dice)

    def _near(self, vectors: Vectors) -> Vectors:
        return _toward(vectors, self._dice.uniform(*NEAR, size=len(vectors)), self._dice)


def key(number: int) -> str:
    return sha256(f"entry {number}".encode()).hexdigest()


def scope_name(scope: int) -> str:
    return sha256(f"scope {scope}".encode()).hexdigest()


def _text() -> str:
    dice, words = np.random.default_rng(SEED), _WORDS.split()
    return " ".join(words[i] for i in dice.integers(len(words), size=200_000))


_TEXT = _text()


def _directions(dice: Dice, count: int) -> Vectors:
    drawn = dice.standard_normal((count, DIMENSION), dtype=np.float32)
    return _unit(drawn)


def _unit(vectors: Vectors) -> Vectors:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _toward(vectors: Vectors, cosine: float | NDArray[np.float64], dice: Dice) -> Vectors:
    """Unit vectors at these cosines from the given ones, in directions of their own."""
    aside = _directions(dice, len(vectors))
    aside -= (aside * vectors).sum(axis=1, keepdims=True) * vectors
    near: Vectors = np.broadcast_to(np.asarray(cosine, dtype=np.float32), len(vectors))[:, None]
    far: Vectors = np.sqrt(1 - near**2, dtype=np.float32)
    mixed: Vectors = near * vectors + far * _unit(aside)
    return _unit(mixed)


def _copies(dice: Dice, scope_of: Numbers) -> tuple[Numbers, Numbers]:
    """Which entries are rewordings, and of which ones of their scope, none of them a rewording itself."""
    order = np.argsort(scope_of, kind="stable")  # scope by scope
    begins = np.searchsorted(scope_of[order], scope_of[order])  # where the scope of each place begins
    rank = np.arange(len(order)) - begins
    sources = order[begins + (dice.random(len(order)) * rank).astype(np.int64)]
    drawn = np.zeros(len(order), dtype=bool)
    drawn[order] = (dice.random(len(order)) < (1 - (1 - 4 * COPIES) ** 0.5) / 2) & (rank > 0)
    is_copy = drawn[order] & ~drawn[sources]
    return order[is_copy], sources[is_copy]
