"""Every question through every system, in turns: so whatever else the machine does touches all of them alike."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.cache.embeddings import Embedded
from bench.cache.measures import Tally
from bench.cache.system import Maker, Replay, Request, Served, System, TimesItself, Turn, Vectors, Work
from bench.cache.threshold import curve


@dataclass(slots=True)
class Result:
    """What one system did in one replay."""

    name: str
    tally: Tally
    seconds: list[float] = field(default_factory=list)  # of each lookup
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """What all systems did in one replay, and what a static threshold, any of THRESHOLDS, would have done."""

    replay: Replay
    results: dict[str, Result]  # by the name that --systems takes
    curve: list[Tally]


def played(replay: Replay, embedded: Embedded, makers: Mapping[str, Maker]) -> Found:
    """Raises CannotRun."""
    turns = replay.turns
    row = {text: number for number, text in enumerate(embedded.texts)}
    vectors = embedded.vectors[np.array([row[turn.text] for turn in turns])]  # [N, D]
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder, ExitStack() as open_systems:
        systems: dict[str, System] = {}
        for name, make in makers.items():
            own = Path(folder, name)
            own.mkdir()
            dimension = vectors.shape[1]
            systems[name] = make(Work(embedded.texts, embedded.path.absolute(), dimension, replay.most_entries, own))
            open_systems.callback(systems[name].close)
        results = {
            name: Result(system.name, Tally.of(replay), versions=getattr(system, "versions", {}))
            for name, system in systems.items()
        }
        _ask_all(replay, vectors, [(system, results[name]) for name, system in systems.items()])
    return Found(replay, results, curve(replay, vectors))


def _ask_all(replay: Replay, vectors: Vectors, systems: Sequence[tuple[System, Result]]) -> None:
    turns, number = replay.turns, 0
    with tqdm(total=len(turns), desc=replay.name) as bar:
        for episode in replay.episodes:
            for system, _ in systems:
                system.clear()
            for turn in episode:
                request = Request(number, turn.text, vectors[number], turn.answer)
                first = number % max(1, len(systems))
                for system, result in (*systems[first:], *systems[:first]):
                    _take(turn, request, system, result, replay, turns)
                number += 1
                bar.update()


def _take(turn: Turn, request: Request, system: System, result: Result, replay: Replay, turns: Sequence[Turn]) -> None:
    """One question of one system: asked, judged, stored, as its role says."""
    served = None
    if turn.role.is_asked:
        served, seconds = _timed(system, request)
        result.seconds.append(seconds)
    if served and turn.role.is_judged:
        result.tally.add(turn, replay.judge(turns[served.number], turn))
    if served is None and turn.role.is_stored:
        system.store(request)


def _timed(system: System, request: Request) -> tuple[Served | None, float]:
    begun = time.perf_counter()
    served = system.ask(request)
    seconds = time.perf_counter() - begun
    return served, system.seconds if isinstance(system, TimesItself) else seconds
