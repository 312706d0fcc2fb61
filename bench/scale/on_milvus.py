"""One size on a real Milvus server: filled in bulk, then looked up at once and again when all is indexed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml
from pymilvus import MilvusClient

from bench.scale.entries import DIMENSION, Population, Question, Vectors, key, scope_name
from bench.scale.lookups import Asked, Found, Series, apart, created, looked_up, written
from bench.scale.server import Held, folder_mb, held, milvus, settled
from bench.servers import Server
from gateway.cache.collection import Rows
from gateway.config import Milvus

SETTINGS = Path("config/cache/milvus.yaml")
PARTITIONS = 64
WIDER_EF = 256  # what more effort in a search brings
BATCH_ROWS = 1000
IN_FLIGHT = (1, 16)
AT = (1, 5)
WRITTEN = 1000  # entries, fewer than the queue holds
DISK = ("insert_log", "index_files", "rocksmq*", "*")  # of the server's data: rows, indexes, log of writes, all
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of the truly nearest entries of the scope that a search found."""

    tier: str
    scope_entries: float  # on average
    searches: int
    at_1: float
    at_5: float


@dataclass(frozen=True, slots=True)
class State:
    """What was measured at one time."""

    words: str
    held: Held
    series: list[Series]
    recalls: list[Recall]
    load_average: float  # of a minute, at the end
    milvus_mb: float
    client_mb: float
    empty_client_mb: float


@dataclass(frozen=True, slots=True)
class Result:
    entries: int
    scopes: int
    partitions: int | None
    insert_seconds: float
    fastest_per_second: float  # inserted, of a piece of the entries
    settle_seconds: float | None  # from the last insertion until nothing changed any more; None: not measured
    states: list[State]
    disk_mb: dict[str, float]  # by folder
    milvus_empty_mb: float
    written_per_second: float | None
    when: str

    @property
    def kind(self) -> tuple[int, int]:
        return self.entries, self.partitions or 0


def measured(count: int, scopes: int | None, queries: int, partitions: int | None, say: Say) -> Iterator[Result]:
    """What is known so far, again and again, the whole at last. Raises `CannotStart`."""
    with TemporaryDirectory(prefix="scale-") as folder, milvus(Path(folder)) as (server, port):
        settings = configured(port, partitions)
        client = MilvusClient(settings.connection.address)
        collection = apart(created, settings)
        empty_mb = server.resident_mb()
        population = Population(count, scopes)
        vectors, pieces = filled(client, collection, population)
        insert_seconds = sum(seconds for _, seconds in pieces)
        say(f"{count:,} entries inserted in {insert_seconds:.1f} s: {count / insert_seconds:,.0f} a second")
        truth = asked(population, vectors, queries)
        now = held(client, collection, count)
        states = [state("right after the insertion", settings, truth, now, server)]
        say(f"looked up, {now.words}")

        def result(settle: float | None, written: float | None) -> Result:
            disk = {name: sum(folder_mb(file) for file in Path(folder, "data/data").glob(name)) for name in DISK}
            return Result(
                entries=count,
                scopes=len(population.sizes),
                partitions=partitions,
                insert_seconds=insert_seconds,
                fastest_per_second=max(rows / seconds for rows, seconds in pieces),
                settle_seconds=settle,
                states=list(states),
                disk_mb=disk,
                milvus_empty_mb=empty_mb,
                written_per_second=written,
                when=f"{datetime.now(UTC):%H:%M}",
            )

        yield result(None, None)
        began = time.monotonic()
        now, settle_seconds = settled(client, collection, count)
        say(f"settled {settle_seconds:.0f} s later (waited {time.monotonic() - began:.0f} s): {now.words}")
        states.append(state("all indexed", settings, truth, now, server))
        wider = configured(port, partitions, ef=WIDER_EF)
        states.append(state(f"all indexed, ef {WIDER_EF}", wider, truth.largest_only(), now, server))
        yield result(settle_seconds, None)
        more = [
            population.entry(count + i, vectors[i], scope=len(population.sizes)) for i in range(min(WRITTEN, count))
        ]
        yield result(settle_seconds, apart(written, settings, more))


def configured(port: int, partitions: int | None, ef: int | None = None) -> Milvus:
    tree = yaml.safe_load(SETTINGS.read_text())
    tree["connection"] |= {"port": port}
    tree["collection"] |= {"partitions": partitions}
    if ef is not None:
        tree["search"]["params"]["ef"] = ef
    return Milvus.model_validate(tree)


def filled(client: MilvusClient, collection: str, population: Population) -> tuple[Vectors, list[tuple[int, float]]]:
    """All vectors; of each piece the rows, and the seconds that pymilvus and Milvus took for them."""
    vectors = np.empty((population.count, DIMENSION), dtype=np.float32)
    rows, pieces = Rows("embedding", DIMENSION), []
    for start, piece in population.pieces("insert"):
        vectors[start : start + len(piece)] = piece
        seconds = 0.0
        for first in range(0, len(piece), BATCH_ROWS):
            batch = []
            for i in range(first, min(first + BATCH_ROWS, len(piece))):
                batch += rows.of_entry(population.entry(start + i, piece[i])) or []
            began = time.perf_counter()
            client.insert(collection, batch, timeout=120)
            seconds += time.perf_counter() - began
        pieces.append((len(piece), seconds))
    return vectors, pieces


@dataclass(frozen=True, slots=True)
class Truth:
    asked: Asked
    nearest: dict[str, list[list[str]]]  # by tier, for each search: keys of the nearest entries of its scope
    scope_entries: dict[str, float]

    def largest_only(self) -> Truth:
        searches = {"largest": self.asked.searches["largest"]}
        return replace(self, asked=replace(self.asked, keys={}, raw_keys=[], searches=searches))


def asked(population: Population, vectors: Vectors, queries: int) -> Truth:
    """What to look up, and what brute force finds."""
    dice = np.random.default_rng(7)
    each = min(queries, population.count // 3)
    numbers = dice.permutation(population.count)[: 3 * each].reshape(3, each)
    keys = [[key(int(number)) for number in row] for row in numbers]
    searches, nearest, sizes = {}, {}, {}
    for tier, scopes in population.tiers().items():
        questions = population.questions(vectors, scopes, queries)
        searches[tier] = [(scope_name(question.scope), question.vector) for question in questions]
        nearest[tier] = list(brute_force(population, vectors, questions))
        sizes[tier] = float(np.mean([population.sizes[question.scope] for question in questions]))
    return Truth(Asked(dict(zip(IN_FLIGHT, keys, strict=False)), keys[2], searches, IN_FLIGHT), nearest, sizes)


def brute_force(population: Population, vectors: Vectors, questions: list[Question]) -> Iterator[list[str]]:
    members = {q.scope: np.flatnonzero(population.scope_of == q.scope) for q in questions}
    of_scope = {scope: vectors[numbers] for scope, numbers in members.items()}
    for question in questions:
        similarities = of_scope[question.scope] @ question.vector  # (entries of the scope,)
        best = np.argsort(-similarities)[: max(AT)]
        yield [key(int(number)) for number in members[question.scope][best]]


def state(words: str, settings: Milvus, truth: Truth, now: Held, server: Server) -> State:
    found: Found = apart(looked_up, settings, truth.asked)
    recalls = [recall(tier, found.keys[tier], truth) for tier in found.keys]
    memory = server.resident_mb(), found.client_mb, found.empty_client_mb
    return State(words, now, found.series, recalls, os.getloadavg()[0], *memory)


def recall(tier: str, found: list[list[str] | None], truth: Truth) -> Recall:
    shares: dict[int, list[float]] = {at: [] for at in AT}
    for keys, nearest in zip(found, truth.nearest[tier], strict=True):
        for at in AT:
            if keys is not None:
                wanted = set(nearest[:at])
                shares[at].append(len(wanted & set(keys[:at])) / len(wanted))
    at_1, at_5 = (float(np.mean(shares[at])) if shares[at] else 0.0 for at in AT)
    return Recall(tier, truth.scope_entries[tier], len(shares[1]), at_1, at_5)
