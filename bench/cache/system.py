"""What is replayed, and what it is replayed through.

A system of this benchmark is anything that looks a question up among those that it has stored. `bench.cache.systems`
lists those there are; the replay asks them in turns, times `ask` and judges what was served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


class CannotRun(Exception):
    """A part of the benchmark is missing or has failed; the text says which."""


class Verdict(Enum):
    RIGHT = 0
    WRONG = 1
    UNKNOWN = 2  # nobody has labelled the question that was asked beside the one whose answer was served


class Role(Enum):
    """What is done with a question: asked of the system? stored when that is a miss? judged?"""

    PUT = (False, True, False)  # stored unasked: what the cache holds
    WARM = (True, True, False)
    ASK = (True, True, True)
    PROBE = (True, False, True)

    def __init__(self, is_asked: bool, is_stored: bool, is_judged: bool) -> None:
        self.is_asked = is_asked
        self.is_stored = is_stored
        self.is_judged = is_judged


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a replay, with what is known about it."""

    text: str
    answer: str  # what the model would say: questions with the same truth have the same answer
    role: Role
    is_repeat: bool  # the right thing is to serve it: a question with its answer came before


@dataclass(frozen=True, slots=True)
class Replay:
    """Questions in their order. Each episode begins with an empty cache; a stream is one episode."""

    name: str
    words: str
    episodes: list[list[Turn]]
    judge: Callable[[Turn, Turn], Verdict]  # of the question whose answer was served, and the one that was asked
    others: str  # what the questions that are no repeats are called

    @property
    def turns(self) -> list[Turn]:
        """All, in order; a turn's place in this list is its number."""
        return [turn for episode in self.episodes for turn in episode]

    @property
    def is_stream(self) -> bool:
        return len(self.episodes) == 1 and any(turn.role is Role.ASK for turn in self.episodes[0])

    @property
    def most_entries(self) -> int:
        return max(map(len, self.episodes))


@dataclass(frozen=True, slots=True)
class Request:
    """What a system gets to see of a turn."""

    number: int  # of the turn in its replay
    text: str
    embedding: Vectors  # [D], L2-normalised
    answer: str  # the model's, so not for `ask`; equal answers are the same answer


@dataclass(frozen=True, slots=True)
class Served:
    number: int  # of the stored request whose answer it is
    similarity: float  # cosine, or what the system has instead


class System(Protocol):
    name: str

    def ask(self, request: Request) -> Served | None:
        """Look `request` up; None is a miss. The time this takes is the system's latency."""

    def store(self, request: Request) -> None:
        """The model was asked, and said `request.answer`. Called after a miss; not timed."""

    def clear(self) -> None:
        """Forget all entries: another episode begins."""

    def close(self) -> None:
        """Let go of what is held."""


@runtime_checkable
class TimesItself(Protocol):
    """A system in another process: what its lookups take is measured there."""

    seconds: float  # of the last lookup


@dataclass(frozen=True, slots=True)
class Work:
    """What a system is made for: one replay."""

    texts: list[str]  # [N], each once
    vectors: Path  # .npy, float32 [N, D]: the embeddings of `texts`
    dimension: int
    most_entries: int
    folder: Path  # an empty one, gone after the replay


Maker = Callable[[Work], System]
