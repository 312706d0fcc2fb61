"""Counts of what was served, and what they say: shares with exact intervals, a static threshold at the same error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.cache.system import Replay, Turn, Verdict
from training.thresholds import clopper_pearson


@dataclass(slots=True)
class Tally:
    """What a system served of what it was judged on."""

    requests: int
    repeats: int  # of the requests: the right thing was to serve them
    right: int = 0
    wrong: int = 0
    unknown: int = 0
    others_served: int = 0  # hits on requests that are no repeats

    @classmethod
    def of(cls, replay: Replay, right: int = 0, wrong: int = 0, unknown: int = 0, others_served: int = 0) -> Tally:
        judged = [turn for turn in replay.turns if turn.role.is_judged]
        return cls(len(judged), sum(turn.is_repeat for turn in judged), right, wrong, unknown, others_served)

    def add(self, asked: Turn, verdict: Verdict) -> None:
        self.right += verdict is Verdict.RIGHT
        self.wrong += verdict is Verdict.WRONG
        self.unknown += verdict is Verdict.UNKNOWN
        self.others_served += not asked.is_repeat

    @property
    def others(self) -> int:
        return self.requests - self.repeats

    @property
    def hits(self) -> int:
        return self.right + self.wrong + self.unknown

    def known(self) -> Counts:
        """What nobody has labelled is left out, of the requests as well."""
        return Counts(self.requests - self.unknown, self.right + self.wrong, self.wrong)

    def strict(self) -> Counts:
        """What nobody has labelled is wrong."""
        return Counts(self.requests, self.hits, self.wrong + self.unknown)


@dataclass(frozen=True, slots=True)
class Counts:
    requests: int
    hits: int
    wrong: int  # of the hits

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0

    @property
    def error(self) -> float | None:
        """The share of the hits that is wrong; None without hits."""
        return self.wrong / self.hits if self.hits else None

    @property
    def wrong_rate(self) -> float:
        """The share of the requests that is served something wrong."""
        return self.wrong / self.requests if self.requests else 0.0


def interval(part: int, whole: int) -> tuple[float, float]:
    """The exact 95 % interval of a share that was `part` of `whole`."""
    return clopper_pearson(part, whole) if whole else (0.0, 1.0)


def at_error(curve: Iterable[Counts], error: float) -> float | None:
    """The most hits, as a share of the requests, of any threshold whose `error` is no higher; None: none has any."""
    return max(
        (counts.hit_rate for counts in curve if counts.error is not None and counts.error <= error), default=None
    )


def at_wrong_rate(curve: Iterable[Counts], wrong_rate: float) -> float | None:
    """The same for the share of the requests that is served something wrong."""
    return max((counts.hit_rate for counts in curve if counts.hits and counts.wrong_rate <= wrong_rate), default=None)
