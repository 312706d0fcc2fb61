"""The endpoints of a model: choice, ejection, trial, rest, health; every test has a clock of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import config
from gateway.config import Ejection, Model, Price, Upstream
from gateway.endpoints import (
    BURST,
    CHECKS_TO_BE_DOWN,
    MOST_REST_SECONDS,
    Address,
    Allowance,
    Endpoint,
    Endpoints,
    Kind,
    Lease,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Fleet:
    """A model's endpoints and what is done to them."""

    def __init__(self, weights: Sequence[float] = (1, 1), addresses: dict[str, Address] | None = None, **ejection: Any):
        urls = [f"http://e{i}" for i in range(len(weights))]
        model = Model(
            name="m",
            endpoints=tuple(config.Endpoint(url=url, weight=weight) for url, weight in zip(urls, weights, strict=True)),
            price_per_million_tokens=Price(input=1, output=1),
            context_window=1,
            size="small",
        )
        self.clock = Clock()
        self.addresses = addresses or {url: Address(url) for url in urls}
        upstream = Upstream(ejection=Ejection(**{"consecutive_failures": 3, "seconds": 10, **ejection}))
        self.endpoints = Endpoints(model, upstream, self.addresses, self.clock)
        self.all = self.endpoints.all

    def send(self) -> Lease:
        chosen = self.endpoints.choose()
        assert chosen is not None
        return self.endpoints.take(chosen)

    def number(self, lease: Lease) -> int:
        return self.all.index(lease.endpoint)

    def answer(self, i: int, seconds: float = 0.0, kind: Kind = "stream") -> None:
        lease = self.endpoints.take(self.all[i])
        self.clock.now += seconds
        lease.began(kind)
        lease.whole()

    def fail(self, i: int, times: int = 1) -> list[float | None]:
        return [self.endpoints.take(self.all[i]).failed() for _ in range(times)]

    def shares(self, requests: int) -> list[int]:
        """Of requests that are answered one after another."""
        counts: Counter[int] = Counter()
        for _ in range(requests):
            lease = self.send()
            counts[self.number(lease)] += 1
            lease.whole()
        return [counts[i] for i in range(len(self.all))]

    def states(self) -> list[str]:
        return [figures.state for figures in self.endpoints.figures()]


# Choice


@pytest.mark.parametrize(
    ("weights", "shares"), [((1, 1), [60, 60]), ((3, 1), [90, 30]), ((0.5, 1, 1.5), [20, 40, 60]), ((1,), [120])]
)
def test_idle_endpoints_take_turns_by_weight(weights: Sequence[float], shares: list[int]) -> None:
    assert Fleet(weights).shares(120) == shares


@pytest.mark.parametrize(
    ("weights", "outstanding"), [((1, 1), [20, 20]), ((3, 1), [30, 10]), ((0.5, 1, 2.5), [5, 10, 25])]
)
def test_outstanding_requests_are_spread_by_weight(weights: Sequence[float], outstanding: list[int]) -> None:
    fleet = Fleet(weights)
    for _ in range(40):
        fleet.send()
    assert [endpoint.outstanding for endpoint in fleet.all] == pytest.approx(outstanding, abs=1)


def test_the_least_outstanding_is_chosen() -> None:
    fleet = Fleet((1, 1, 1))
    leases = [fleet.send() for _ in range(9)]
    for lease in leases:
        if fleet.number(lease) == 1:
            lease.whole()
    assert [fleet.number(fleet.send()) for _ in range(3)] == [1, 1, 1]


def test_models_at_one_address_count_together() -> None:
    addresses = {f"http://e{i}": Address(f"http://e{i}") for i in range(2)}
    one, other = Fleet(addresses=addresses), Fleet(addresses=addresses)
    one.endpoints.take(one.all[0])
    assert [other.number(other.send()) for _ in range(2)] == [1, 0]
    assert [figures.outstanding for figures in other.endpoints.figures()] == [1, 1]


def test_what_was_tried_is_not_chosen_again() -> None:
    fleet = Fleet()
    assert fleet.endpoints.choose({fleet.all[0]}) is fleet.all[1]
    assert fleet.endpoints.choose(set(fleet.all)) is None
    assert fleet.endpoints.least_bad(set(fleet.all)) is None


def test_a_slow_endpoint_gets_fewer_and_its_share_back_when_it_is_quick_again() -> None:
    fleet = Fleet()
    for _ in range(30):
        fleet.answer(0, 1.0)
        fleet.answer(1, 0.1)
    assert fleet.shares(100) == [20, 80]  # a quarter, however slow it is
    for _ in range(60):
        fleet.answer(0, 0.1)
    assert fleet.shares(100) == pytest.approx([50, 50], abs=3)


def test_how_long_whole_answers_take_counts_only_beside_their_like() -> None:
    fleet = Fleet((1, 1, 1))
    fleet.answer(0, 30.0, "whole")
    fleet.answer(1, 0.1)
    fleet.answer(2, 0.1)
    assert fleet.shares(90) == [30, 30, 30]
    fleet.answer(1, 10.0, "whole")
    assert [figures.first_byte_seconds for figures in fleet.endpoints.figures()] == pytest.approx([None, 0.1, 0.1])
    assert [figures.answer_seconds for figures in fleet.endpoints.figures()] == pytest.approx([30.0, 10.0, None])
    assert fleet.all[0].slowness == pytest.approx(3.0, abs=0.01)


def test_an_endpoint_that_fails_at_once_does_not_look_idle() -> None:
    fleet = Fleet(max_share=0)
    for _ in range(10):
        fleet.send().began("stream")
    for _ in range(5):
        fleet.fail(0)
    chosen = [fleet.number(fleet.send()) for _ in range(4)]
    assert chosen == [1] * 4


def test_an_error_rate_is_forgotten_in_time() -> None:
    fleet = Fleet(max_share=0)
    fleet.fail(0, 5)
    assert fleet.shares(10) == [0, 10]
    assert fleet.endpoints.figures()[0].error_rate == pytest.approx(1 - 0.9**5)
    fleet.clock.now += 60
    assert fleet.endpoints.figures()[0].error_rate < 0.1
    assert fleet.shares(10) == pytest.approx([5, 5], abs=1)


# Ejection and trial


def test_failures_in_a_row_eject() -> None:
    fleet = Fleet()
    assert fleet.fail(0, 2) == [None, None]
    fleet.answer(0)
    assert fleet.fail(0, 3) == [None, None, 10]
    assert fleet.states() == ["ejected", "up"]
    assert fleet.shares(10) == [0, 10]


def test_an_ejected_endpoint_gets_one_request_when_its_time_is_over() -> None:
    fleet = Fleet()
    fleet.fail(0, 3)
    fleet.clock.now += 10
    assert fleet.states() == ["trial", "up"]
    leases = [fleet.send() for _ in range(6)]
    assert [fleet.number(lease) for lease in leases].count(0) == 1
    (trial,) = [lease for lease in leases if fleet.number(lease) == 0]
    trial.began("stream")
    assert fleet.states() == ["up", "up"]
    trial.whole()
    assert fleet.all[0].failures == 0


def test_a_failed_trial_ejects_for_longer_up_to_a_limit() -> None:
    fleet = Fleet()
    fleet.fail(0, 3)
    periods = []
    for _ in range(5):
        fleet.clock.now = fleet.all[0].ejected_until or 0
        periods += fleet.fail(0)
    assert periods == [20, 40, 80, 80, 80]
    fleet.clock.now += 80
    fleet.answer(0)
    assert fleet.fail(0, 3)[-1] == 10  # an answer has made good for all that


def test_after_a_trial_one_failure_ejects_again() -> None:
    fleet = Fleet()
    fleet.fail(0, 3)
    fleet.clock.now += 10
    trial = fleet.endpoints.take(fleet.all[0])
    trial.began("stream")
    assert trial.failed() == 20  # it breaks its answer off
    assert fleet.states() == ["ejected", "up"]


def test_a_trial_is_over_when_its_answer_begins() -> None:
    fleet = Fleet()
    fleet.fail(0, 3)
    fleet.clock.now += 10
    trial = fleet.endpoints.take(fleet.all[0])
    trial.began("stream")
    assert fleet.fail(0) == [20]  # ejected again while the stream of the trial goes on
    fleet.clock.now += 20
    assert fleet.states() == ["trial", "up"]
    assert [fleet.number(fleet.send()) for _ in range(6)].count(0) == 1
    trial.whole()
    assert fleet.states() == ["trial", "up"]
    assert [fleet.number(fleet.send()) for _ in range(6)].count(0) == 0  # the second trial has not begun to answer
    assert fleet.all[0].trials == 1


def test_a_trial_that_the_client_gives_up_leaves_room_for_another() -> None:
    fleet = Fleet()
    fleet.fail(0, 3)
    fleet.clock.now += 10
    fleet.endpoints.take(fleet.all[0]).given_up()
    assert fleet.states() == ["trial", "up"]
    assert [fleet.number(fleet.send()) for _ in range(2)].count(0) == 1


def test_requests_from_before_an_ejection_change_nothing_about_it() -> None:
    fleet = Fleet()
    early = [fleet.endpoints.take(fleet.all[0]) for _ in range(3)]
    fleet.fail(0, 3)
    fleet.clock.now += 5
    early[0].began("stream")
    early[0].whole()
    assert early[1].failed() is None
    assert fleet.states() == ["ejected", "up"]
    fleet.clock.now += 6
    assert early[2].failed() is None
    assert fleet.states() == ["trial", "up"]


@pytest.mark.parametrize(
    ("endpoints", "max_share", "most"), [(1, 0.5, 0), (2, 0.5, 1), (3, 0.5, 1), (4, 0.75, 3), (2, 1, 2)]
)
def test_no_more_than_a_share_is_ejected(endpoints: int, max_share: float, most: int) -> None:
    fleet = Fleet([1] * endpoints, max_share=max_share)
    for i in range(endpoints):
        fleet.fail(i, 10)
    assert fleet.states().count("ejected") == most


def test_when_all_are_out_the_least_bad_is_tried() -> None:
    fleet = Fleet((1, 1, 1), max_share=1)
    fleet.fail(0, 3)
    fleet.clock.now += 1
    fleet.fail(1, 3)
    for _ in range(CHECKS_TO_BE_DOWN):
        fleet.all[2].address.checked(healthy=False)
    assert fleet.endpoints.choose() is None
    assert fleet.states() == ["ejected", "ejected", "down"]
    tried: set[Endpoint] = set()
    for expected in fleet.all:  # out for the shortest time first, down last
        found = fleet.endpoints.least_bad(tried)
        assert found is expected
        tried.add(found)
    lease = fleet.endpoints.take(fleet.all[1])
    lease.began("stream")
    assert fleet.states() == ["ejected", "up", "down"]


def test_endpoints_that_are_as_bad_share_the_load() -> None:
    fleet = Fleet((1, 1, 2))
    for endpoint in fleet.all:
        endpoint.address.failed_checks = CHECKS_TO_BE_DOWN
    counts = Counter[int]()
    for _ in range(40):
        found = fleet.endpoints.least_bad()
        assert found is not None
        counts[fleet.all.index(found)] += 1
        fleet.endpoints.take(found).whole()
    assert counts == {0: 10, 1: 10, 2: 20}


# Retry-After


def test_an_endpoint_rests_as_long_as_it_asks() -> None:
    fleet = Fleet()
    fleet.endpoints.take(fleet.all[0]).asked_to_wait(5)
    assert fleet.states() == ["resting", "up"]
    assert fleet.endpoints.rest_left() == 5
    assert fleet.shares(4) == [0, 4]
    fleet.clock.now += 5
    assert fleet.states() == ["up", "up"]
    assert fleet.endpoints.rest_left() is None
    assert fleet.all[0].failures == 0


def test_a_rest_ends_however_long_was_asked_for() -> None:
    fleet = Fleet((1,))
    fleet.endpoints.take(fleet.all[0]).asked_to_wait(1e12)
    assert fleet.endpoints.rest_left() == MOST_REST_SECONDS
    assert fleet.endpoints.choose() is None
    assert fleet.endpoints.least_bad() is None  # it has asked not to be


# Health checks


def test_an_address_is_down_after_two_failed_checks_and_back_after_one_good_one() -> None:
    fleet = Fleet()
    address = fleet.all[0].address
    assert address.checked(healthy=False) is False
    assert fleet.states() == ["up", "up"]
    assert address.checked(healthy=False) is True
    assert fleet.states() == ["down", "up"]
    assert fleet.shares(4) == [0, 4]
    fleet.fail(0, 3)
    assert address.checked(healthy=True) is True
    assert fleet.states() == ["up", "up"]  # it is another process: what the old one did is forgiven
    assert fleet.all[0].failures == 0
    assert fleet.endpoints.figures()[0].error_rate == 0


def test_a_good_check_does_not_end_an_ejection() -> None:
    fleet = Fleet()
    fleet.fail(0, 3)
    fleet.all[0].address.checked(healthy=True)
    assert fleet.states() == ["ejected", "up"]


# Accounts


def test_a_lease_ends_once() -> None:
    fleet = Fleet()
    lease = fleet.send()
    lease.failed()
    lease.whole()
    lease.failed()
    lease.given_up()
    assert [endpoint.outstanding for endpoint in fleet.all] == [0, 0]
    assert fleet.all[0].failures == 1


ENDS: dict[str, Callable[[Lease], object]] = {
    "whole": Lease.whole,
    "failed": Lease.failed,
    "wait": lambda lease: lease.asked_to_wait(3),
    "leave": Lease.given_up,
}


def step(fleet: Fleet, leases: list[Lease], what: str, i: int) -> None:
    fleet.clock.now += i
    if what == "send":
        endpoint = fleet.endpoints.choose() or fleet.endpoints.least_bad()
        leases += [fleet.endpoints.take(endpoint)] if endpoint else []
    elif what in ("sick", "well"):
        fleet.all[i % 3].address.checked(healthy=what == "well")
    elif leases and what == "began":
        leases[i % len(leases)].began("stream")
    elif leases:
        ENDS[what](leases.pop(i % len(leases)))


@settings(database=None, deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["send", "began", "sick", "well", *ENDS]), st.integers(0, 5))))
def test_whatever_happens_the_accounts_are_right(steps: list[tuple[str, int]]) -> None:
    fleet, leases = Fleet((1, 2, 3)), list[Lease]()
    for what, i in steps:
        step(fleet, leases, what, i)
        for endpoint in fleet.all:
            mine = [lease for lease in leases if lease.endpoint is endpoint]
            assert endpoint.outstanding == endpoint.address.outstanding == len(mine)
            assert 0 <= endpoint.trials <= len(mine)
            assert 0 <= endpoint.error_rate(fleet.clock.now) <= 1
            assert 1 <= endpoint.slowness <= 4
    for lease in leases:
        lease.given_up()
    assert [endpoint.trials for endpoint in fleet.all] == [0, 0, 0]
    fleet.clock.now += MOST_REST_SECONDS
    for endpoint in fleet.all:
        endpoint.address.checked(healthy=True)
        assert endpoint.may_be_asked(fleet.clock.now)  # none is lost for good


def test_second_tries_are_a_share_of_all_requests() -> None:
    allowance = Allowance(0.2)
    assert sum(allowance.spend() for _ in range(100)) == BURST
    granted = 0
    for _ in range(100):
        allowance.earn()
        granted += allowance.spend()
    assert granted == pytest.approx(20, abs=1)
    never = Allowance(0)
    never.earn()
    assert not never.spend()
