"""What one measurement gives, and what is made of several; no I/O."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Sample:
    """One case at one number of requests in flight, once."""

    case: str
    in_flight: int
    round: int
    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int
    right: float  # share of the answers that came the way that the case is about
    server_cpu_seconds: float  # of the measured server
    generator_cpu_seconds: float

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def cpu_ms(self) -> float | None:
        """Of the measured server, for one request; None without requests."""
        return 1000 * self.server_cpu_seconds / self.requests if self.requests else None

    @property
    def generator_cores(self) -> float:
        """How much of a core the load generator took; at 1 it can do no more."""
        return self.generator_cpu_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class StreamSample:
    """Streams from one server, once: `steady`, begun one after the other, or `burst`, begun all at once."""

    server: str
    kind: str
    round: int
    streams: int  # whose first token was timed
    p50_ms: float  # until the first token
    p99_ms: float
    errors: int
    generator_cores: float


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank; 0 when there are no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None when none is."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


T = TypeVar("T", Sample, StreamSample)


def paired(first: Iterable[T], second: Iterable[T], compare: Callable[[T, T], float]) -> float | None:
    """The median, over the rounds that have both, of what `compare` makes of them; None when there is no such round.

    Two figures of one round were taken within a minute, so that what else the machine did touched both alike.
    """
    others = {sample.round: sample for sample in second if sample.p50_ms}
    return median(compare(sample, others[sample.round]) for sample in first if sample.p50_ms and sample.round in others)


def added_ms(sample: T, base: T) -> float:
    return sample.p50_ms - base.p50_ms


def p50_ratio(sample: Sample, base: Sample) -> float:
    return sample.p50_ms / base.p50_ms


def rate_ratio(sample: Sample, base: Sample) -> float:
    return sample.per_second / base.per_second
