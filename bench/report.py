"""What a run comes to: the targets and whether they are reached, what casts doubt on it, JSON and Markdown; no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.cases import CACHING, CASES, IN_FLIGHT, PLAIN, STREAM_SERVERS, STREAMS, STUB
from bench.figures import Sample, StreamSample, added_ms, median, p50_ratio, paired, rate_ratio

LEAST_RIGHT = 0.99  # of the answers must come the way that the case is about
LEAST_SPARE = 3.0  # times what goes through it, the stub must be able to answer
MOST_CORES = 0.95  # of a load generator that is not what limits the figures
WORDS = {case.name: case.words for case in CASES}


@dataclass(frozen=True, slots=True)
class Run:
    """All that was measured, and with what."""

    settings: dict[str, str]  # in words
    machine: dict[str, str]
    versions: dict[str, str]
    samples: tuple[Sample, ...]
    streams: tuple[StreamSample, ...]
    resident_mb: dict[str, float]  # server -> the most that was seen

    def of(self, case: str, in_flight: int) -> list[Sample]:
        return [sample for sample in self.samples if (sample.case, sample.in_flight) == (case, in_flight)]

    def streams_of(self, server: str, kind: str) -> list[StreamSample]:
        return [sample for sample in self.streams if (sample.server, sample.kind) == (server, kind)]


@dataclass(frozen=True, slots=True)
class Target:
    """What issue 4 asks for."""

    words: str
    limit: float
    at_most: bool  # else at least
    unit: str
    measured: float | None  # None: this run did not measure it

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def targets(run: Run) -> list[Target]:
    named, exact, routed = run.of("named", 1), run.of("exact", 16), run.of("miss", 1)
    resident = [run.resident_mb[name] for name in (PLAIN, CACHING) if name in run.resident_mb]
    return [
        Target("named model, p50 over the stub, 1 in flight", 1.0, True, "ms", added(named, run.of("stub", 1))),
        Target(
            "named model, requests/s beside LiteLLM's, 16 in flight",
            30.0,
            False,
            "times",
            paired(run.of("named", 16), run.of("litellm", 16), rate_ratio),
        ),
        Target("exact hits, 16 in flight", 3000.0, False, "/s", median(sample.per_second for sample in exact)),
        Target(
            "routed miss, p50 beside that of the Triton call itself, 1 in flight",
            1.5,
            True,
            "times",
            paired(routed, run.of("triton", 1), p50_ratio),
        ),
        *(
            Target(
                f"first token later than direct, {STREAMS} streams, {words}",
                2.0,
                True,
                "ms",
                paired(run.streams_of(PLAIN, kind), run.streams_of(STUB, kind), added_ms),
            )
            for kind, words in KINDS.items()
        ),
        Target("resident memory of a worker", 150.0, True, "MB", max(resident, default=None)),
    ]


KINDS = {"steady": "begun one after the other", "burst": "begun at once"}


def added(samples: Sequence[Sample], base: Sequence[Sample]) -> float | None:
    return paired(samples, base, added_ms)


def problems(run: Run) -> list[str]:
    """What casts doubt on the figures."""
    return [*_wrong_answers(run.samples), *_slow_stub(run), *_slow_generators(run), *_broken_streams(run.streams)]


def _wrong_answers(samples: Iterable[Sample]) -> Iterator[str]:
    for sample in samples:
        if sample.errors or not sample.requests:
            yield f"{_name(sample)}: {sample.errors} errors, {sample.requests} answers"
        elif sample.right < LEAST_RIGHT:
            yield f"{_name(sample)}: only {100 * sample.right:.1f} % of the answers came the way that is meant"


def _slow_stub(run: Run) -> Iterator[str]:
    for case in ("litellm", "named", "miss"):
        for in_flight in IN_FLIGHT:
            spare = paired(run.of("stub", in_flight), run.of(case, in_flight), rate_ratio)
            if spare is not None and spare < LEAST_SPARE:
                yield f"{WORDS[case]}, {in_flight} in flight: the stub alone answers only {spare:.1f} times as many"


def _slow_generators(run: Run) -> Iterator[str]:
    for sample in run.samples:
        if sample.case != "stub" and sample.generator_cores > MOST_CORES:
            yield f"{_name(sample)}: the load generator took {sample.generator_cores:.2f} of a core"
    for streams in run.streams:
        if streams.generator_cores > MOST_CORES / 2:  # its own turn on the processor must not be what a token waits for
            yield f"{_stream_name(streams)}: the client took {streams.generator_cores:.2f} of a core"


def _broken_streams(streams: Iterable[StreamSample]) -> Iterator[str]:
    for sample in streams:
        if sample.errors or not sample.streams:
            yield f"{_stream_name(sample)}: {sample.errors} errors, {sample.streams} streams timed"


def _name(sample: Sample) -> str:
    return f"{WORDS[sample.case]}, {sample.in_flight} in flight, round {sample.round + 1}"


def _stream_name(sample: StreamSample) -> str:
    return f"streams of {STREAM_SERVERS[sample.server]}, {KINDS[sample.kind]}, round {sample.round + 1}"


def as_json(run: Run) -> dict[str, Any]:
    """Everything, the single measurements too."""
    judged = [{**asdict(target), "reached": target.reached} for target in targets(run)]
    samples = [{**asdict(sample), "per_second": sample.per_second, "cpu_ms": sample.cpu_ms} for sample in run.samples]
    return {**asdict(run), "samples": samples, "targets": judged, "problems": problems(run)}


def as_markdown(run: Run) -> str:
    parts = [
        "# Benchmark",
        "Written by `make bench`; what is measured, and how, is in [docs/benchmarks.md](../../docs/benchmarks.md).",
        _listed({**run.settings, **run.machine}),
        _listed(run.versions),
        "## Targets",
        _table(("", "target", "measured", "reached"), map(_target_row, targets(run))),
        "## Requests",
        "Medians of the rounds; what is compared is compared within a round.",
        _table(("", "in flight", "p50 ms", "p99 ms", "requests/s", "CPU ms a request", "compared"), _request_rows(run)),
        "## Streams",
        f"Until the first token, {STREAMS} streams at once, each of 50 events a second for a second.",
        _table(("", "", "p50 ms", "p99 ms", "p50 over the stub, ms", "streams timed"), _stream_rows(run)),
        "## Memory",
        _table(("", "resident MB"), ((name, _figure(size, 0)) for name, size in run.resident_mb.items())),
        "## What it was measured with",
        _listed(instruments(run)),
        "## Doubts",
        "\n".join(f"- {problem}" for problem in problems(run)) or "None: see docs/benchmarks.md for what is checked.",
    ]
    return "\n\n".join(parts) + "\n"


def instruments(run: Run) -> dict[str, str]:
    """How far the stub and the load generators are from being what limits the figures."""
    found = {}
    for in_flight in IN_FLIGHT:
        rate = median(sample.per_second for sample in run.of("stub", in_flight))
        spare = paired(run.of("stub", in_flight), run.of("named", in_flight), rate_ratio)
        if rate is not None and spare is not None:
            words = f"{_figure(rate, 0)} requests/s, {_figure(spare, 1)} times what the gateway passes through"
            found[f"the stub alone, {in_flight} in flight"] = words
    cores = [sample.generator_cores for sample in run.samples if sample.case != "stub"]
    if cores:
        found["most of a core that a load generator took"] = _figure(max(cores), 2)
    if run.streams:
        found["most of a core that the client of the streams took"] = _figure(
            max(sample.generator_cores for sample in run.streams), 2
        )
    return found


def _target_row(target: Target) -> tuple[str, ...]:
    digits = 0 if target.limit >= 100 else 2
    limit = f"{'≤' if target.at_most else '≥'} {target.limit:,g} {target.unit}"
    reached = {None: "not measured", True: "yes", False: "**no**"}[target.reached]
    return (target.words, limit, _figure(target.measured, digits), reached)


def _request_rows(run: Run) -> Iterator[tuple[str, ...]]:
    for in_flight in IN_FLIGHT:
        for case in CASES:
            samples = run.of(case.name, in_flight)
            if samples:
                yield (
                    case.words,
                    str(in_flight),
                    _figure(median(sample.p50_ms for sample in samples), 2),
                    _figure(median(sample.p99_ms for sample in samples), 2),
                    _figure(median(sample.per_second for sample in samples), 0),
                    _figure(median(sample.cpu_ms for sample in samples), 3),
                    "; ".join(_compared(run, case.name, samples, in_flight)),
                )


def _compared(run: Run, case: str, samples: Sequence[Sample], in_flight: int) -> Iterator[str]:
    stub, litellm, triton = (run.of(name, in_flight) for name in ("stub", "litellm", "triton"))
    if case in ("litellm", "named") and (over := added(samples, stub)) is not None:
        yield f"p50 {over:+.2f} ms over the stub"
    if case == "named" and (times := paired(samples, litellm, rate_ratio)) is not None:
        yield f"{times:.1f} times LiteLLM's requests/s"
    if case in ("miss", "semantic") and (times := paired(samples, triton, p50_ratio)) is not None:
        yield f"{times:.2f} times Triton's p50"


def _stream_rows(run: Run) -> Iterator[tuple[str, ...]]:
    for kind, words in KINDS.items():
        for server, name in STREAM_SERVERS.items():
            samples = run.streams_of(server, kind)
            over = paired(samples, run.streams_of(STUB, kind), added_ms) if server != STUB else None
            if samples:
                yield (
                    name,
                    words,
                    _figure(median(sample.p50_ms for sample in samples), 2),
                    _figure(median(sample.p99_ms for sample in samples), 2),
                    "" if over is None else f"{over:+.2f}",
                    str(sum(sample.streams for sample in samples)),
                )


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _listed(pairs: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in pairs.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
