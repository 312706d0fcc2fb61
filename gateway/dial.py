"""The cost dial: the complexity from which on prompts go to the large model, so that they are the wanted share.

A `Dial` is the estimate for one rule, and a function of what it has seen alone. It counts complexities in a histogram
of BINS bins, of equal width in log-odds, in which a request weighs half as much after `half_life` others (the forward
decay of Cormode et al. 2009): the bar is the lowest bin such that no more than the wanted share lies above it. What the
model was really given is counted, too: what it got too much (or too little) of late makes the wanted share smaller (or
larger), down to nothing. So the share is right in the long run, however the prompts change, and of any n requests in a
row the model gets at most `at_most` * n + half_life / 10 + 1, besides those that it gets wherever the bar is.

`Dials` are those of all policies. Each process has its own: where each keeps the share, so do all of them together.
They are kept in a file, `N.json` with the lowest N that no other process has, written every SAVE_SECONDS and at the
end, by another thread. A file that cannot be read or written is told in the log, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import math
import os
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TextIO

import orjson
from pydantic import Field, ValidationError

from gateway.checked import Section
from gateway.config import Policy, Share
from gateway.metrics import Metrics
from gateway.policy import SHUT, Bar, Pull
from gateway.values import Amount, Real

log = logging.getLogger("fingerpost")

SAVE_SECONDS = 10.0
MAX_FILES = 1024  # processes with one data folder

LOWEST, HIGHEST, WIDTH = -8.0, 8.0, 1 / 16  # log-odds; what lies beyond is in the first and the last bin
HELD_BINS = 8  # by which the bar is lower for the earlier turns of a conversation: half a unit of log-odds
PRIOR_WEIGHT = 50.0  # of the uniform distribution that a dial begins with, in requests


def _edges() -> tuple[float, ...]:
    """Where the bins begin; after the last of them, a bar that nothing reaches."""
    steps = range(round((HIGHEST - LOWEST) / WIDTH) + 1)
    return (0.0, *(1 / (1 + math.exp(-(LOWEST + step * WIDTH))) for step in steps), math.inf)


EDGES = _edges()
BINS = len(EDGES) - 1


class State(Section):
    """What a dial knows; weights are in requests as of the last one."""

    counts: Annotated[tuple[Amount, ...], Field(min_length=BINS, max_length=BINS)]  # by bin
    forced: Amount  # weight of the requests that go to the model wherever the bar is
    others: Amount  # weight of those that never do
    given: Amount  # weight of those that went to it
    seen: Amount  # weight of all of them
    excess: Real  # what it was given beyond its share, in requests


def fresh() -> State:
    """Nothing was seen: each complexity is as likely as any other."""
    widths = [min(1.0, after) - before for before, after in pairwise(EDGES)]
    counts = tuple(PRIOR_WEIGHT * width for width in widths)
    return State(counts=counts, forced=0, others=0, given=0, seen=0, excess=0)


class Dial:
    def __init__(self, share: Share, state: State | None = None) -> None:
        self.share = share
        self._most_excess = share.half_life / 20
        self._growth = 2 ** (1 / share.half_life)
        self._restore(state or fresh())

    def _restore(self, state: State) -> None:
        self._unit = 1.0  # the weight of a request, which grows instead of all others becoming less
        self._counts = list(state.counts)
        self._forced, self._others = state.forced, state.others
        self._given, self._seen = state.given, state.seen
        self._excess = state.excess
        self._lowest = self._find()

    @property
    def state(self) -> State:
        unit = self._unit
        return State(
            counts=tuple(count / unit for count in self._counts),
            forced=self._forced / unit,
            others=self._others / unit,
            given=self._given / unit,
            seen=self._seen / unit,
            excess=self._excess,
        )

    @property
    def bar(self) -> Bar:
        if self._lowest == BINS:
            return SHUT
        return Bar(EDGES[self._lowest], EDGES[max(0, self._lowest - HELD_BINS)])

    @property
    def given_share(self) -> float:
        """The share that the model was given of late; 0 when nothing was seen."""
        return self._given / self._seen if self._seen else 0.0

    def observe(self, pull: Pull) -> None:
        """Take a request into account that a model was asked to answer."""
        self._unit *= self._growth
        place = _place(pull)
        if pull.forced:
            self._forced += self._unit
        elif place is None:
            self._others += self._unit
        else:
            self._counts[place] += self._unit
        self._given += self._unit * pull.given
        self._seen += self._unit
        excess = self._excess + pull.given - self.share.at_most
        self._excess = min(max(excess, -self._most_excess), self._most_excess + 1)
        if self._unit > 1e100:
            self._restore(self.state)
        self._lowest = self._find()

    def _find(self) -> int:
        """The lowest bin that may still go to the model; BINS when none may."""
        wanted = self._wanted()
        room = wanted * (sum(self._counts) + self._forced + self._others) - self._forced
        lowest = BINS
        while wanted > 0 and lowest > 0 and self._counts[lowest - 1] <= room:
            lowest -= 1
            room -= self._counts[lowest]
        return lowest

    def _wanted(self) -> float:
        """The share to aim at: `at_most` when nothing is in excess, 0 at the most that may be, 1 at the least."""
        at_most, excess = self.share.at_most, self._excess / self._most_excess
        return max(0.0, at_most * (1 - excess)) if excess > 0 else min(1.0, at_most - (1 - at_most) * excess)


def _place(pull: Pull) -> int | None:
    """The highest bar, as a bin, that lets the request through."""
    places = []
    if pull.newest is not None:
        places.append(_bin(pull.newest))
    if pull.earlier is not None:
        places.append(min(BINS - 1, _bin(pull.earlier) + HELD_BINS))
    return max(places, default=None)


def _bin(complexity: float) -> int:
    return min(BINS - 1, max(0, bisect_right(EDGES, complexity) - 1))


class Dials:
    """The dials of all policies, by alias and rule."""

    def __init__(self, policies: Mapping[str, Policy], metrics: Metrics) -> None:
        self._metrics = metrics
        self._dials: dict[str, dict[str, Dial]] = {}
        self.changed = False  # since `changed` was last set to False
        self.configure(policies)

    def configure(self, policies: Mapping[str, Policy]) -> None:
        """Have a dial for each rule with a share; those that there are already go on with what they know."""
        self._take(policies, self.states)

    def restore(self, states: Mapping[str, Mapping[str, State]]) -> None:
        """Go on with what was kept of these dials; what was kept of others is forgotten."""
        for alias, rule, dial in self:
            if state := states.get(alias, {}).get(rule):
                self._dials[alias][rule] = Dial(dial.share, state)

    def bars(self, alias: str) -> dict[str, Bar]:
        """For the rules of a policy that have a share."""
        return {rule: dial.bar for rule, dial in self._dials.get(alias, {}).items()}

    def observe(self, alias: str, pulls: Mapping[str, Pull]) -> None:
        """Take a request into account that a model is asked to answer."""
        for rule, pull in pulls.items():
            if dial := self._dials.get(alias, {}).get(rule):  # else the configuration is another one by now
                dial.observe(pull)
                self.changed = True

    def publish(self) -> None:
        for alias, rule, dial in self:
            self._metrics.dial_bar.labels(alias, rule).set(dial.bar.newest)
            self._metrics.dial_share.labels(alias, rule).set(dial.given_share)

    @property
    def states(self) -> dict[str, dict[str, State]]:
        return {alias: {rule: dial.state for rule, dial in dials.items()} for alias, dials in self._dials.items()}

    def __bool__(self) -> bool:
        return any(self._dials.values())

    def __iter__(self) -> Iterator[tuple[str, str, Dial]]:
        return iter([(alias, rule, dial) for alias, dials in self._dials.items() for rule, dial in dials.items()])

    def _take(self, policies: Mapping[str, Policy], known: Mapping[str, Mapping[str, State]]) -> None:
        self._dials = {
            alias: {
                rule.name: Dial(rule.share, known.get(alias, {}).get(rule.name))
                for rule in policy.rules
                if rule.share is not None
            }
            for alias, policy in policies.items()
        }


class _Kept(Section):
    """A file of dials."""

    classifier: str  # fingerprint: the complexities of two classifiers are never in one histogram
    dials: dict[str, dict[str, State]]


@contextlib.asynccontextmanager
async def keeping(dials: Dials, folder: Path, classifier: str, metrics: Metrics) -> AsyncIterator[None]:
    """Have the dials go on where they were, and keep them in `folder` from now on. Without any, nothing is touched."""
    if not dials:
        yield
        return
    try:
        lock, path = _claimed(folder)
    except OSError as error:
        _failed(metrics, f"dials are not kept: {error}")
        yield
        return
    with lock:
        _restore(dials, path, classifier, metrics)
        stop = asyncio.Event()
        saving = asyncio.create_task(_save_until(stop, dials, path, classifier, metrics))
        try:
            yield
        finally:
            stop.set()
            await saving


def _claimed(folder: Path) -> tuple[TextIO, Path]:
    """The first file that no other process has, and what holds it as long as it is open. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MAX_FILES):
        lock = (folder / f"{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return lock, folder / f"{number}.json"
    raise OSError(f"{folder}: {MAX_FILES} processes have their dials there")


def _restore(dials: Dials, path: Path, classifier: str, metrics: Metrics) -> None:
    try:
        kept = _Kept.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValidationError) as error:
        _failed(metrics, f"dials begin anew, {path} cannot be read: {type(error).__name__}")
        return
    if kept.classifier == classifier:
        dials.restore(kept.dials)
    else:
        log.info("dials begin anew: the classifier is another one than that of %s", path)


async def _save_until(stop: asyncio.Event, dials: Dials, path: Path, classifier: str, metrics: Metrics) -> None:
    stopped = False
    while not stopped:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), SAVE_SECONDS)
        stopped = stop.is_set()  # before what is left is written
        if dials.changed:
            dials.changed = False
            await asyncio.to_thread(_save, _Kept(classifier=classifier, dials=dials.states), path, metrics)


def _save(kept: _Kept, path: Path, metrics: Metrics) -> None:
    """Replace the file by a whole one, or leave it as it is."""
    new = path.with_suffix(".new")
    try:
        with new.open("wb") as file:
            file.write(orjson.dumps(kept.model_dump()))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        _failed(metrics, f"dials are not kept: {error}")


def _failed(metrics: Metrics, words: str) -> None:
    log.warning("%s", words)
    metrics.degradations.labels("dial").inc()
