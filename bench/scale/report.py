"""What a run comes to, in Markdown and JSON; no I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from pydantic import TypeAdapter

from bench.scale import in_memory, on_milvus
from bench.scale.lookups import Series


@dataclass(frozen=True, slots=True)
class Run:
    runs: tuple[dict[str, str], ...] = ()  # when, on what, with what; the latest last
    memory: tuple[in_memory.Result, ...] = ()
    milvus: tuple[on_milvus.Result, ...] = ()

    def with_memory(self, found: in_memory.Result) -> Run:
        others = [result for result in self.memory if result.entries != found.entries]
        return replace(self, memory=tuple(sorted([*others, found], key=lambda result: result.entries)))

    def with_milvus(self, found: on_milvus.Result) -> Run:
        others = [result for result in self.milvus if result.kind != found.kind]
        return replace(self, milvus=tuple(sorted([*others, found], key=lambda result: result.kind)))


def read(text: bytes) -> Run:
    return TypeAdapter(Run).validate_json(text)


def as_json(run: Run) -> str:
    return json.dumps(asdict(run), indent=1) + "\n"


def as_markdown(run: Run) -> str:
    parts = [
        "# The semantic cache by size",
        "Written by `python -m bench.scale`; what is measured, and how, is in [docs/scale.md](../../docs/scale.md).",
        *("\n".join(f"- {name}: {value}" for name, value in about.items()) for about in run.runs),
    ]
    if run.milvus:
        parts += ["## Milvus", *_milvus(run.milvus)]
    if run.memory:
        parts += ["## In memory", *_memory(run.memory)]
    return "\n\n".join(parts) + "\n"


def _milvus(results: Sequence[on_milvus.Result]) -> Iterator[str]:
    yield "Filled in bulk. *Settled*: seconds from the last insertion until all was sealed, compacted and indexed."
    head = (
        *("entries", "scopes", "partitions", "inserted a second (at best)", "insertion, s", "settled, s", "segments"),
        *(
            "Milvus empty / at once / settled, MB",
            "client, MB",
            "disk: rows / indexes / log of writes, MB",
            "stored a second",
            "load average",
            "until, UTC",
        ),
    )
    yield _table(head, map(_filling, results))
    yield (
        "Lookups through `MilvusCache` in a process that stored none of what it asked for, p50 / p99 in ms. "
        "*n unanswered*: not within the gateway's second. *n missed*: answered that it was not there."
    )
    columns = (
        "entries",
        "partitions",
        "when",
        "lookup",
        "1 in flight",
        "16 in flight",
        "a second",
        "recall @1",
        "recall @5",
    )
    yield _table(columns, (row for result in results for state in result.states for row in _lookups(result, state)))


def _filling(result: on_milvus.Result) -> Iterator[str]:
    last = result.states[-1]
    yield from (f"{result.entries:,}", f"{result.scopes:,}", str(result.partitions or "none"))
    yield from (_rate(result), f"{result.insert_seconds:,.1f}")
    yield "not waited for" if result.settle_seconds is None else f"{result.settle_seconds:,.0f}"
    yield last.held.words
    yield " / ".join(f"{mb:,.0f}" for mb in (result.milvus_empty_mb, *(state.milvus_mb for state in result.states[:2])))
    yield f"{last.client_mb:,.0f} ({last.empty_client_mb:,.0f} before)"
    yield " / ".join(f"{mb:,.0f}" for name, mb in result.disk_mb.items() if name != "*")
    yield "" if result.written_per_second is None else f"{result.written_per_second:,.0f}"
    yield " / ".join(f"{state.load_average:.1f}" for state in result.states)
    yield result.when


def _rate(result: on_milvus.Result) -> str:
    return f"{result.entries / result.insert_seconds:,.0f} ({result.fastest_per_second:,.0f})"


def _lookups(result: on_milvus.Result, state: on_milvus.State) -> Iterator[tuple[str, ...]]:
    recalls = {f"search, {recall.tier} scope": recall for recall in state.recalls}
    by_kind: dict[str, dict[int, Series]] = {}
    for series in state.series:
        by_kind.setdefault(series.kind, {})[series.in_flight] = series
    for kind, at_once in by_kind.items():
        found = recalls.get(kind)
        words = f"{kind} ({found.scope_entries:,.0f})" if found else kind
        shares = (_share(found.at_1), _share(found.at_5)) if found else ("", "")
        most = at_once[max(at_once)]
        rate = f"{most.per_second:,.0f}"
        times = (_times(at_once.get(1)), _times(at_once.get(16)))
        yield (f"{result.entries:,}", str(result.partitions or "none"), state.words, words, *times, rate, *shares)


def _times(series: Series | None) -> str:
    if series is None:
        return ""
    words = f"{series.p50_ms:.1f} / {series.p99_ms:.1f}" if series.lookups else "none"
    for number, what in ((series.unanswered, "unanswered"), (series.missing, "missed")):
        words += f", {number} {what}" if number else ""
    return words


def _share(share: float) -> str:
    return f"{share:.3f}"


def _memory(results: Sequence[in_memory.Result]) -> Iterator[str]:
    yield (
        "Each call holds the event loop for as long as it takes: p50 / p99 in ms, of puts also the longest. "
        "Recall is 1: all entries of the scope are compared."
    )
    head = (
        *("entries", "resident, MB", "bytes an entry", "get", "search, small", "search, middle", "search, largest"),
        *("put into a full cache", "count, ms", "full garbage collection, ms"),
    )
    yield _table(head, map(_held, results))


def _held(result: in_memory.Result) -> Iterator[str]:
    yield from (f"{result.entries:,}", f"{result.resident_mb:,.0f}", f"{result.entry_bytes:,.0f}")
    yield _spread(result.get)
    for tier, times in result.searches.items():
        yield f"{_spread(times)} ({result.scope_entries[tier]:,.0f})"
    yield f"{_spread(result.put)}, {result.put.most_ms:,.1f}"
    yield from (f"{result.count_ms:,.1f}", f"{result.garbage_ms:,.0f}")


def _spread(times: in_memory.Times) -> str:
    return f"{times.p50_ms:.3f} / {times.p99_ms:.3f}"


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
