"""Stored questions by cosine: one matrix product over all of them; nothing ever leaves but all together."""

from __future__ import annotations

import numpy as np

from bench.cache.system import Request, Served, Vectors, Work


class Store:
    def __init__(self, work: Work) -> None:
        self._vectors = np.zeros((work.most_entries, work.dimension), np.float32)
        self._numbers: list[int] = []  # of the requests that the rows of `_vectors` belong to

    def nearest(self, embedding: Vectors, floor: float, count: int = 1) -> list[Served]:
        """The `count` most similar of at least `floor`, best first."""
        similarities = self._vectors[: len(self._numbers)] @ embedding
        if count == 1 and self._numbers:
            rows = similarities.argmax(axis=0, keepdims=True)
        else:
            rows = np.argsort(-similarities, kind="stable")[:count]
        found = [Served(self._numbers[row], float(similarities[row])) for row in rows.tolist()]
        return [served for served in found if served.similarity >= floor]

    def add(self, request: Request) -> None:
        self._vectors[len(self._numbers)] = request.embedding
        self._numbers.append(request.number)

    def clear(self) -> None:
        self._numbers.clear()
