"""A model's endpoints: which one takes the next request, and what became of the last ones. Pure: the clock is given.

    up ── failures in a row ──> ejected ── its time is over ──> trial ── an answer begins ──> up
                                   ^────── it fails again: out for longer ─────┘

Beside this, an address is down while its health checks fail, and an endpoint rests as long as its Retry-After asks.
The next request goes to the endpoint with the least load,

    load = (requests outstanding at its address + HANDICAP * error rate, rounded down) * slowness / weight

which is Envoy's and nginx's least-outstanding with weights; errors and slowness add to it, so that an endpoint that
fails quickly does not look idle. Equal loads, such as none at all, take turns by weight / slowness (start-time fair
queueing, Goyal et al. 1996).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from gateway import config

Clock = Callable[[], float]  # seconds, never going back
State = Literal["up", "trial", "ejected", "resting", "down"]
Kind = Literal["stream", "whole"]  # a stream begins with its first token, an answer in one piece with its last

SMOOTHING = 0.1  # share of the newest request in an average
FORGET_SECONDS = 30.0  # in which an error rate falls to 1/e by itself, so that an endpoint is tried again
HANDICAP = 10
MOST_SLOWNESS = 4.0  # a slow endpoint still gets a quarter of its turns, which show when it is quick again
SLACK_SECONDS = 0.02  # differences of this order say nothing
MOST_DOUBLINGS = 3  # of the time out, for an endpoint that fails its trials
MOST_REST_SECONDS = 300.0  # longer is not asked for in earnest
CHECKS_TO_BE_DOWN = 2  # one may be late because the server is busy
BURST = 10.0  # requests sent again after a time-out at the start, and at most at once


@dataclass(eq=False, slots=True)
class Address:
    """A server, at which several models may be served."""

    url: str
    outstanding: int = 0
    failed_checks: int = 0  # in a row
    endpoints: list[Endpoint] = field(default_factory=list)

    @property
    def is_down(self) -> bool:
        return self.failed_checks >= CHECKS_TO_BE_DOWN

    def checked(self, *, healthy: bool) -> bool:
        """Note a health check; whether the address went down or came back with it."""
        was_down = self.is_down
        self.failed_checks = 0 if healthy else self.failed_checks + 1
        if was_down and healthy:
            for endpoint in self.endpoints:
                endpoint.forgive()
        return self.is_down != was_down


@dataclass(eq=False, slots=True)
class Endpoint:
    """One model at one address."""

    address: Address
    weight: float = 1.0
    outstanding: int = 0
    failures: int = 0  # in a row
    ejections: int = 0  # in a row
    ejected_until: float | None = None
    trials: int = 0  # requests since it was ejected whose answer has not begun
    rests_until: float = -math.inf
    errors: float = 0.0  # the error rate at errors_at
    errors_at: float = 0.0
    seconds: dict[Kind, float] = field(default_factory=dict)  # until an answer begins, averaged
    slowness: float = 1.0  # beside the quickest endpoint of the model
    turn: float = 0.0

    def state(self, now: float) -> State:
        if self.address.is_down:
            return "down"
        if self.ejected_until is not None and now < self.ejected_until:
            return "ejected"
        if now < self.rests_until:
            return "resting"
        return "up" if self.ejected_until is None else "trial"

    def may_be_asked(self, now: float) -> bool:
        """Up, or on trial with nobody trying it."""
        state = self.state(now)
        return state == "up" or (state == "trial" and not self.trials)

    def error_rate(self, now: float) -> float:
        return self.errors * math.exp((self.errors_at - now) / FORGET_SECONDS)

    def load(self, now: float) -> float:
        was_ejected = self.ejected_until is not None  # and has served its time: its trial is not put off any longer
        handicap = 0 if was_ejected else int(HANDICAP * self.error_rate(now))
        return (self.address.outstanding + handicap) * self.slowness / self.weight

    def note(self, now: float, *, failed: bool) -> None:
        rate = self.error_rate(now)
        self.errors, self.errors_at = rate + SMOOTHING * (failed - rate), now

    def forgive(self) -> None:
        """As if it had never failed; how quick it was is not forgotten."""
        self.failures = self.ejections = 0
        self.ejected_until = None
        self.errors = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What is shown of an endpoint."""

    url: str
    weight: float
    state: State
    outstanding: int
    first_byte_seconds: float | None  # of streams
    answer_seconds: float | None  # of answers that are not streamed
    error_rate: float
    failures_in_a_row: int


class Endpoints:
    """All endpoints of a model."""

    def __init__(
        self,
        model: config.Model,
        settings: config.Upstream,
        addresses: Mapping[str, Address],
        clock: Clock,
    ) -> None:
        """`addresses`: by url, shared with other models at the same servers."""
        self.all = [Endpoint(addresses[endpoint.url], endpoint.weight) for endpoint in model.endpoints]
        for endpoint in self.all:
            endpoint.address.endpoints.append(endpoint)
        self.second_tries = Allowance(settings.timeout_retry_share)
        self.clock = clock
        self._ejection = settings.ejection
        self._turn = 0.0

    def choose(self, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """The one for the next request, beside those `tried`; None when none of them may be asked."""
        now = self.clock()
        able = (endpoint for endpoint in self.all if endpoint not in tried and endpoint.may_be_asked(now))
        return min(able, key=lambda endpoint: self._order(endpoint, now), default=None)

    def least_bad(self, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """The one to try rather than fail, beside those `tried`; None when there is none but those that rest."""
        now = self.clock()
        awake = (endpoint for endpoint in self.all if endpoint not in tried and now >= endpoint.rests_until)
        return min(awake, key=lambda endpoint: (_badness(endpoint), *self._order(endpoint, now)), default=None)

    def rest_left(self, tried: Collection[Endpoint] = ()) -> float | None:
        """Seconds until one that only rests may be asked; None when none of them does."""
        now = self.clock()
        resting = (endpoint for endpoint in self.all if endpoint not in tried and endpoint.state(now) == "resting")
        return min((endpoint.rests_until - now for endpoint in resting), default=None)

    def take(self, endpoint: Endpoint) -> Lease:
        """Count a request that is sent to the endpoint."""
        self._turn = max(endpoint.turn, self._turn)
        endpoint.turn = self._turn + endpoint.slowness / endpoint.weight
        return Lease(self, endpoint)

    def figures(self) -> list[Figures]:
        now = self.clock()
        return [
            Figures(
                url=endpoint.address.url,
                weight=endpoint.weight,
                state=endpoint.state(now),
                outstanding=endpoint.outstanding,
                first_byte_seconds=endpoint.seconds.get("stream"),
                answer_seconds=endpoint.seconds.get("whole"),
                error_rate=endpoint.error_rate(now),
                failures_in_a_row=endpoint.failures,
            )
            for endpoint in self.all
        ]

    def measured(self, endpoint: Endpoint, kind: Kind, seconds: float) -> None:
        """Note how long an answer took to begin, and compare the endpoints anew."""
        before = endpoint.seconds.get(kind, seconds)
        endpoint.seconds[kind] = before + SMOOTHING * (seconds - before)
        quickest: dict[Kind, float] = {}
        for other in self.all:
            for known, value in other.seconds.items():
                quickest[known] = min(quickest.get(known, value), value)
        for other in self.all:
            other.slowness = _slowness(other.seconds, quickest)

    def failed(self, endpoint: Endpoint, *, on_trial: bool) -> float | None:
        """Note a failure; the seconds that the endpoint is ejected for, if it is ejected now."""
        now, limit = self.clock(), self._ejection.consecutive_failures
        endpoint.note(now, failed=True)
        endpoint.failures += 1
        if on_trial and endpoint.ejected_until is not None:
            return self._eject(endpoint, now) if now >= endpoint.ejected_until else None
        if endpoint.ejected_until is None and endpoint.failures >= limit and self._may_eject():
            return self._eject(endpoint, now)
        return None

    def reinstate(self, endpoint: Endpoint) -> None:
        """An ejected endpoint answers: it is back, and one more failure ejects it again."""
        endpoint.ejected_until = None
        endpoint.failures = self._ejection.consecutive_failures - 1

    def _order(self, endpoint: Endpoint, now: float) -> tuple[float, float]:
        return endpoint.load(now), max(endpoint.turn, self._turn)

    def _eject(self, endpoint: Endpoint, now: float) -> float:
        seconds = self._ejection.seconds * 2.0 ** min(endpoint.ejections, MOST_DOUBLINGS)
        endpoint.ejections += 1
        endpoint.ejected_until = now + seconds
        return seconds

    def _may_eject(self) -> bool:
        ejected = sum(endpoint.ejected_until is not None for endpoint in self.all)
        return ejected + 1 <= self._ejection.max_share * len(self.all)


class Lease:
    """A request that is outstanding at an endpoint. It ends once: `whole`, `failed`, `asked_to_wait` or `given_up`."""

    __slots__ = ("_ended", "_endpoints", "_on_trial", "_started", "endpoint")

    def __init__(self, endpoints: Endpoints, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._endpoints = endpoints
        self._started = endpoints.clock()
        self._on_trial = endpoint.ejected_until is not None
        self._ended = False
        endpoint.outstanding += 1
        endpoint.address.outstanding += 1
        endpoint.trials += self._on_trial

    def began(self, kind: Kind | None) -> None:
        """The first byte of an answer is there, with which a trial is over.

        `kind` is None when it tells nothing about the endpoint's speed.
        """
        if kind is not None:
            self._endpoints.measured(self.endpoint, kind, self._endpoints.clock() - self._started)
        if not self._on_trial:
            return
        self._on_trial = False
        self.endpoint.trials -= 1
        if self.endpoint.ejected_until is not None:
            self._endpoints.reinstate(self.endpoint)

    def whole(self) -> None:
        """The answer is there to its end."""
        if self._end():
            self.endpoint.note(self._endpoints.clock(), failed=False)
            if self.endpoint.ejected_until is None:
                self.endpoint.failures = self.endpoint.ejections = 0

    def failed(self, kind: Kind | None = None) -> float | None:
        """No answer, or not to its end; the seconds that the endpoint is ejected for, if it is ejected now.

        `kind`: it kept us waiting for this kind of answer, which tells how slow it is, too.
        """
        if not self._end():
            return None
        if kind is not None:
            self._endpoints.measured(self.endpoint, kind, self._endpoints.clock() - self._started)
        return self._endpoints.failed(self.endpoint, on_trial=self._on_trial)

    def asked_to_wait(self, seconds: float) -> None:
        """The endpoint is well, but wants no request for so long."""
        self._end()
        rest = min(seconds, MOST_REST_SECONDS)
        self.endpoint.rests_until = max(self.endpoint.rests_until, self._endpoints.clock() + rest)

    def given_up(self) -> None:
        """The client left: nothing is learnt about the endpoint."""
        self._end()

    def _end(self) -> bool:
        if self._ended:
            return False
        self._ended = True
        self.endpoint.outstanding -= 1
        self.endpoint.address.outstanding -= 1
        self.endpoint.trials -= self._on_trial
        return True


class Allowance:
    """Requests that may be sent a second time, where the first may have been half generated: a share of all requests.

    A bounded share keeps endpoints that are slow because they are overloaded from getting every request twice.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._left = BURST if share else 0.0

    def earn(self) -> None:
        self._left = min(self._left + self._share, BURST)

    def spend(self) -> bool:
        """Whether one more may be sent; if so it is counted."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _badness(endpoint: Endpoint) -> tuple[bool, float, int]:
    """Down is worse than ejected, and out for long worse than out for a moment."""
    until = -math.inf if endpoint.ejected_until is None else endpoint.ejected_until
    return endpoint.address.is_down, until, endpoint.failures


def _slowness(seconds: Mapping[Kind, float], quickest: Mapping[Kind, float]) -> float:
    """How many times as long as the quickest it takes, by its streams if it had any: they tell more."""
    if not seconds:
        return 1.0
    kind: Kind = "stream" if "stream" in seconds else "whole"
    return min((seconds[kind] + SLACK_SECONDS) / (quickest[kind] + SLACK_SECONDS), MOST_SLOWNESS)
