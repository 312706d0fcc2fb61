"""The plain cache: the most similar stored question is served when its cosine reaches a threshold.

`Threshold` does so; `curve` is what every threshold would have served.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bench.cache.measures import Tally
from bench.cache.store import Store
from bench.cache.system import Replay, Request, Served, Turn, Vectors, Verdict, Work

LOWEST, STEP = 0.40, 0.005
THRESHOLDS = np.array([*np.arange(LOWEST, 1, STEP), 0.9975, 0.999], np.float32)  # [T], ascending


class Threshold:
    def __init__(self, work: Work, threshold: float) -> None:
        self.name = f"plain, {threshold:.2f}"
        self._threshold = float(np.float32(threshold))  # as exact as a cosine is
        self._store = Store(work)

    def ask(self, request: Request) -> Served | None:
        return next(iter(self._store.nearest(request.embedding, self._threshold)), None)

    def store(self, request: Request) -> None:
        self._store.add(request)

    def clear(self) -> None:
        self._store.clear()

    def close(self) -> None:
        return None


def curve(replay: Replay, vectors: Vectors) -> list[Tally]:
    """What each of THRESHOLDS serves in `replay`, whose turns have `vectors` [N, D]."""
    counts = np.zeros((len(THRESHOLDS), len(Verdict) + 1), int)  # [T, verdicts and hits on what is no repeat]
    first = 0
    with tqdm(total=len(vectors), desc=f"{replay.name}, all thresholds") as bar:
        for episode in replay.episodes:
            _play(episode, vectors[first : first + len(episode)], replay, counts)
            first += len(episode)
            bar.update(len(episode))
    return [Tally.of(replay, *map(int, row)) for row in counts]


def _play(episode: Sequence[Turn], vectors: Vectors, replay: Replay, counts: NDArray[np.int_]) -> None:
    """Add one episode to `counts`, at every threshold in step."""
    stored = np.zeros((len(THRESHOLDS), len(episode)), bool)
    for number, turn in enumerate(episode):
        served = np.full(len(THRESHOLDS), -1)  # [T] whose answer each threshold serves; -1: none
        if turn.role.is_asked:
            served = _served(vectors[:number] @ vectors[number], stored[:, :number])
        if turn.role.is_judged:
            for other in np.unique(served[served >= 0]):
                counts[served == other, replay.judge(episode[other], turn).value] += 1
            if not turn.is_repeat:
                counts[served >= 0, -1] += 1
        if turn.role.is_stored:
            stored[:, number] = served < 0


def _served(similarities: Vectors, stored: NDArray[np.bool_]) -> NDArray[np.int_]:
    """The most similar [T] of those that each threshold has `stored` [T, n], or -1 where it is not similar enough."""
    near = np.flatnonzero(similarities >= THRESHOLDS[0])
    if not near.size:
        return np.full(len(THRESHOLDS), -1)
    candidates = np.where(stored[:, near], similarities[near], np.float32(-2))
    best = candidates.argmax(axis=1)
    return np.where(candidates.max(axis=1) >= THRESHOLDS, near[best], -1)
