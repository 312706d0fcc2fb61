"""What a run comes to, in Markdown, and what casts doubt on it; no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.cache.measures import Counts, Tally, at_error, at_wrong_rate, interval
from bench.cache.replay import Found, Result
from bench.cache.systems import GPTCACHE, GPTCACHE_COSINE, PLAIN
from bench.cache.threshold import THRESHOLDS
from bench.figures import percentile

MOST_APART = 0.005  # of the requests: a threshold by itself and one that was replayed may differ by rounding


@dataclass(frozen=True, slots=True)
class View:
    """One replay, read in one way."""

    words: str
    found: Found
    count: Callable[[Tally], Counts]

    @property
    def curve(self) -> list[Counts]:
        return [self.count(tally) for tally in self.found.curve]


@dataclass(frozen=True, slots=True)
class Run:
    about: dict[str, str]  # when, on what, with what
    found: tuple[Found, ...]
    embedding_seconds: list[float]
    notes: tuple[str, ...]


def views(found: Found) -> list[View]:
    """One, or two where something was served of which nobody knows whether it is right."""
    if not any(result.tally.unknown for result in (*found.results.values(), *map(_as_result, found.curve))):
        return [View(found.replay.name, found, Tally.known)]
    return [
        View(f"{found.replay.name}, unknown left out", found, Tally.known),
        View(f"{found.replay.name}, unknown = wrong", found, Tally.strict),
    ]


def _as_result(tally: Tally) -> Result:
    return Result("", tally)


def as_markdown(run: Run, picture: str) -> str:
    parts = [
        "# Semantic cache",
        "Written by `make bench-cache`; what is measured, and how, is in "
        "[docs/benchmarks.md](../../docs/benchmarks.md#the-semantic-cache).",
        "\n".join(f"- {name}: {value}" for name, value in run.about.items()),
        *(f"**{note}**" for note in (*run.notes, *doubts(run))),
        f"![Wrong answers among the hits against hits, one panel for each set of questions]({picture})",
        "Shares with their exact 95 % intervals (Clopper-Pearson). *Static*: the most hits of any static threshold on "
        "the same embeddings that has no more wrong, as a share of the hits or of the requests; *times*: how many "
        "times as many the system has. None: no threshold has so few wrong.",
    ]
    for found in run.found:
        parts += _section(found)
    parts += ["## Latency", *_latency(run)]
    return "\n\n".join(parts) + "\n"


def _section(found: Found) -> Iterator[str]:
    tally = found.curve[0]
    yield f"## {found.replay.name}"
    words = found.replay.words[:1].upper() + found.replay.words[1:]
    yield f"{words}. {tally.requests:,} requests are judged, {tally.repeats:,} of them can be served rightly."
    for view in views(found):
        if view.words != found.replay.name:
            yield f"### {view.words}"
        yield _table(_head(found), (_row(view, result) for result in found.results.values()))


def _head(found: Found) -> Sequence[str]:
    served = ("repeats served", f"{found.replay.others} served")
    wrong = ("wrong, of the hits", "static", "times", "wrong, of requests", "static", "times")
    return ("", "hits", *wrong, *served, *(("unknown",) if _has_unknown(found) else ()))


def _has_unknown(found: Found) -> bool:
    return len(views(found)) > 1


def _row(view: View, result: Result) -> Sequence[str]:
    tally, counts = result.tally, view.count(result.tally)
    return (
        result.name,
        _share(counts.hits, counts.requests),
        _share(counts.wrong, counts.hits),
        *_beside(counts, None if counts.error is None else at_error(view.curve, counts.error)),
        _share(counts.wrong, counts.requests),
        *_beside(counts, at_wrong_rate(view.curve, counts.wrong_rate)),
        _share(tally.right, tally.repeats),
        _share(tally.others_served, tally.others),
        *((str(tally.unknown),) if _has_unknown(view.found) else ()),
    )


def _beside(counts: Counts, static: float | None) -> tuple[str, str]:
    """The hits of a static threshold, and how many times that `counts` has."""
    if not counts.hits:
        return "", ""
    return (f"{100 * static:.1f} %", f"{counts.hit_rate / static:.2f}") if static else ("none", "")


def _share(part: int, whole: int) -> str:
    if not whole:
        return "0 of 0"
    low, high = interval(part, whole)
    return f"{100 * part / whole:.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({part:,})"


def _latency(run: Run) -> Iterator[str]:
    yield (
        "Of the lookup alone, in milliseconds, asked in turns; GPTCache's is timed in its own process. Each uses one "
        f"thread. The embedding, the same for all, comes before it: median {_ms(run.embedding_seconds, 0.5)} ms, p99 "
        f"{_ms(run.embedding_seconds, 0.99)} ms, one text at a time."
    )
    streams = [found for found in run.found if found.replay.is_stream]
    if not streams:
        return
    names = {name: result.name for found in streams for name, result in found.results.items()}
    rows = (
        [shown, *(_times(found.results[name]) if name in found.results else "" for found in streams)]
        for name, shown in names.items()
    )
    yield _table(["median / p99", *(found.replay.name for found in streams)], rows)


def _times(result: Result) -> str:
    return f"{_ms(result.seconds, 0.5)} / {_ms(result.seconds, 0.99)}"


def _ms(seconds: Sequence[float], share: float) -> str:
    return f"{1000 * percentile(seconds, share):.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def doubts(run: Run) -> list[str]:
    """A system that is a static threshold must have served what the threshold by itself would have."""
    return [
        f"{found.replay.name}: {result.name} has {result.tally.hits} hits, a threshold of {cosine} {expected.hits}"
        for found in run.found
        for name, cosine in {**PLAIN, GPTCACHE: GPTCACHE_COSINE}.items()
        if (result := found.results.get(name)) and _differ(result.tally, expected := _at(found, cosine))
    ]


def _differ(one: Tally, other: Tally) -> bool:
    return (
        abs(one.hits - other.hits) > MOST_APART * one.requests
        or abs(one.right - other.right) > MOST_APART * one.requests
    )


def _at(found: Found, cosine: float) -> Tally:
    return found.curve[int(abs(THRESHOLDS - cosine).argmin())]
