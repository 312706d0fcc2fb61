"""The cost dial: that the share is kept on every stream, and what is kept of it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Policy, Share
from gateway.dial import BINS, EDGES, Dial, Dials, State, fresh, keeping
from gateway.metrics import Metrics
from gateway.policy import SHUT, Bar, Pull

FUZZ = settings(database=None, deadline=None, derandomize=True, max_examples=60)
THIRTY = Share(model="large", at_most=0.3)
POLICY = Policy.model_validate({"rules": [{"name": "dial", "share": THIRTY.model_dump()}], "default": "small"})
CLASSIFIER = "0123456789abcdef"


def run(dial: Dial, complexities: Sequence[float]) -> list[bool]:
    """Whether each was given the large model."""
    given_to: list[bool] = []
    for complexity in complexities:
        given_to.append(complexity >= dial.bar.newest)
        dial.observe(Pull(complexity, None, forced=False, given=given_to[-1]))
    return given_to


def shares(given_to: Sequence[bool], window: int = 1000) -> list[float]:
    """Of each window of so many requests, half a window after the one before."""
    starts = range(0, len(given_to) - window + 1, window // 2)
    return [sum(given_to[start : start + window]) / window for start in starts]


# The share on streams of all kinds


LENGTH = 20_000
DICE = random.Random(7)  # noqa: S311


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


STREAMS: dict[str, tuple[Callable[[int], float], float]] = {
    # complexity of the i-th request, and how far from 30 % a window of a thousand may be
    "still": (lambda i: sigmoid(DICE.gauss(-1, 2)), 0.02),
    "uniform": (lambda i: DICE.random(), 0.02),
    "mostly easy": (lambda i: DICE.random() ** 8, 0.02),
    "slowly harder": (lambda i: sigmoid(DICE.gauss(-3 + 6 * i / LENGTH, 1.5)), 0.03),
    "slowly easier": (lambda i: sigmoid(DICE.gauss(3 - 6 * i / LENGTH, 1.5)), 0.03),
    "always the hardest so far": (lambda i: i / LENGTH, 0.04),
    "day and night": (lambda i: sigmoid(DICE.gauss(2 * math.sin(2 * math.pi * i / 4000), 1.5)), 0.07),
    "other prompts at a stroke": (lambda i: sigmoid(DICE.gauss(3 if i // 5000 % 2 else -3, 1)), 0.05),
    "two complexities": (lambda i: DICE.choice([0.2, 0.8]), 0.02),
    "in blocks": (lambda i: 0.9 if i // 100 % 2 else 0.1, 0.03),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_share_holds(name: str) -> None:
    stream, tolerance = STREAMS[name]
    DICE.seed(name)
    given_to = run(Dial(THIRTY), [stream(i) for i in range(LENGTH)])
    assert sum(given_to) / LENGTH == pytest.approx(0.3, abs=0.005)
    assert max(abs(share - 0.3) for share in shares(given_to)) <= tolerance


@pytest.mark.parametrize("at_most", [0.02, 0.1, 0.5, 0.9])
def test_any_share_holds(at_most: float) -> None:
    DICE.seed(1)
    given_to = run(Dial(Share(model="large", at_most=at_most)), [sigmoid(DICE.gauss(0, 2)) for _ in range(LENGTH)])
    assert sum(given_to) / LENGTH == pytest.approx(at_most, abs=0.005)


def test_the_hardest_get_the_large_model() -> None:
    DICE.seed(2)
    complexities = [sigmoid(DICE.gauss(-1, 2)) for _ in range(LENGTH)]
    given_to = run(Dial(THIRTY), complexities)
    hardest = sorted(complexities, reverse=True)[int(0.3 * LENGTH)]
    agreed = sum((complexity >= hardest) == got for complexity, got in zip(complexities, given_to, strict=True))
    assert agreed / LENGTH > 0.97


def test_of_one_complexity_alone_the_share_is_not_exceeded() -> None:
    given_to = run(Dial(THIRTY), [0.5] * LENGTH)
    assert 0.2 < sum(given_to) / LENGTH <= 0.3


def test_a_dial_begins_as_if_each_complexity_were_as_likely() -> None:
    assert Dial(THIRTY).bar.newest == pytest.approx(0.7, abs=0.02)
    assert Dial(THIRTY).given_share == 0


COMPLEXITY = st.sampled_from([0.0, 1.0, 0.5, 0.7, 0.01]) | st.floats(0, 1)
PULL = st.tuples(st.none() | COMPLEXITY, st.none() | COMPLEXITY, st.sampled_from([False, False, False, True]))


@FUZZ
@given(
    st.lists(st.tuples(st.lists(PULL, min_size=1, max_size=5), st.integers(1, 200)), max_size=8), st.floats(0.05, 0.95)
)
def test_no_stream_gets_more_than_was_promised(parts: list[tuple[list[tuple], int]], at_most: float) -> None:
    """Of any n requests in a row at most `at_most` * n + half_life / 10 + 1, besides those that are forced."""
    dial = Dial(Share(model="large", at_most=at_most, half_life=100))
    beyond = worst = 0.0
    for newest, earlier, forced in (pull for pulls, times in parts for pull in pulls * times):
        bar = dial.bar
        chosen = (newest is not None and newest >= bar.newest) or (earlier is not None and earlier >= bar.earlier)
        dial.observe(Pull(newest, earlier, forced=forced, given=chosen or forced))
        beyond = max(0.0, beyond + (chosen and not forced) - at_most)  # of the worst stretch that ends here
        worst = max(worst, beyond)
    assert worst <= 100 / 10 + 1


def test_what_goes_to_the_model_anyway_is_part_of_the_share() -> None:
    """A fifth is forced: a tenth is left for the dial. Two fifths are: nothing is left."""
    DICE.seed(3)

    def taken(forced_share: float) -> float:
        dial, taken = Dial(THIRTY), 0
        for _ in range(LENGTH):
            forced, complexity = DICE.random() < forced_share, DICE.random()
            chosen = not forced and complexity >= dial.bar.newest
            taken += chosen
            dial.observe(Pull(complexity, None, forced=forced, given=forced or chosen))
        return taken / LENGTH

    assert taken(0.2) == pytest.approx(0.1, abs=0.01)
    assert taken(0.4) < 0.002


def test_the_share_is_of_all_requests_also_of_those_that_another_rule_takes() -> None:
    DICE.seed(4)
    dial, taken = Dial(THIRTY), 0
    for _ in range(LENGTH):
        complexity = DICE.random() if DICE.random() < 0.5 else None
        chosen = complexity is not None and complexity >= dial.bar.newest
        taken += chosen
        dial.observe(Pull(complexity, None, forced=False, given=chosen))
    assert taken / LENGTH == pytest.approx(0.3, abs=0.01)  # 60 % of those that the rule is asked about


def test_conversations_that_keep_their_model_are_part_of_the_share() -> None:
    """Of each conversation of four turns the first says how hard it is; what follows is "go on"."""
    DICE.seed(5)
    dial, given_to, kept = Dial(THIRTY), [], []
    for _ in range(LENGTH // 4):
        first = DICE.random()
        turns = []
        for newest, earlier in ((first, None), *[(0.05, first)] * 3):
            bar = dial.bar
            turns.append(newest >= bar.newest or (earlier is not None and earlier >= bar.earlier))
            dial.observe(Pull(newest, earlier, forced=False, given=turns[-1]))
        given_to += turns
        if turns[0]:
            kept.append(all(turns))
    assert sum(given_to) / LENGTH == pytest.approx(0.3, abs=0.01)
    assert len(kept) > 500
    assert all(kept)


def test_a_bar_is_lower_for_earlier_turns() -> None:
    bar = Dial(THIRTY).bar
    assert math.log(bar.newest / (1 - bar.newest)) - math.log(bar.earlier / (1 - bar.earlier)) == pytest.approx(0.5)


def test_a_dial_is_a_function_of_its_stream() -> None:
    DICE.seed(6)
    complexities = [DICE.random() for _ in range(3000)]
    one, other = Dial(THIRTY), Dial(THIRTY)
    assert run(one, complexities) == run(other, complexities)
    assert one.state == other.state


def test_a_dial_stays_as_large_as_it_is_and_its_numbers_finite() -> None:
    dial = Dial(Share(model="large", at_most=0.3, half_life=100))
    run(dial, [0.1, 0.9, 0.5] * 20_000)  # more than 2 to the power of 600 would be the weight of a request
    assert len(dial.state.counts) == BINS
    assert dial.state.seen == pytest.approx(1 / (1 - 2 ** (-1 / 100)))
    assert dial.given_share == pytest.approx(0.3, abs=0.05)


def test_the_edges() -> None:
    assert list(EDGES) == sorted(set(EDGES))
    assert (EDGES[0], EDGES[-1]) == (0, math.inf)
    dial = Dial(THIRTY)
    for complexity in (0.0, 1.0, 1e-300, math.nextafter(1, 0), *EDGES[:-1]):
        dial.observe(Pull(complexity, complexity, forced=False, given=False))


# What survives a restart


def observed(seed: int = 8, *, metrics: Metrics | None = None) -> Dials:
    DICE.seed(seed)
    dials = Dials({"auto": POLICY}, metrics or Metrics())
    for _ in range(2000):
        dials.observe("auto", {"dial": Pull(DICE.random() / 2, None, forced=False, given=DICE.random() < 0.3)})
    return dials


def kept(folder: Path, dials: Dials, classifier: str = CLASSIFIER, metrics: Metrics | None = None) -> Dials:
    """The dials after a run of a gateway that has them in `folder`."""

    async def once() -> None:
        async with keeping(dials, folder, classifier, metrics or Metrics()):
            dials.changed = True

    asyncio.run(once())
    return dials


def new() -> Dials:
    return Dials({"auto": POLICY}, Metrics())


def test_a_dial_goes_on_where_it_was(tmp_path: Path) -> None:
    dials = observed()
    complexities = [DICE.random() for _ in range(3000)]
    path = tmp_path / "data/dials"

    async def first_run() -> None:
        async with keeping(new(), path, CLASSIFIER, Metrics()):
            pass
        async with keeping(before, path, CLASSIFIER, Metrics()):
            for complexity in complexities:
                before.observe("auto", {"dial": Pull(complexity, None, forced=False, given=complexity > 0.7)})

    before = new()
    asyncio.run(first_run())
    after = kept(path, new())
    assert after.states == before.states
    assert after.bars("auto") == before.bars("auto") != dials.bars("auto")
    assert sorted(file.name for file in path.iterdir()) == ["0.json", "0.lock"]
    assert (path / "0.json").stat().st_size < 20_000


def test_without_a_share_nothing_is_written(tmp_path: Path) -> None:
    kept(tmp_path / "dials", Dials({"auto": Policy(default="small")}, Metrics()))
    assert list(tmp_path.iterdir()) == []


def test_processes_have_a_file_each(tmp_path: Path) -> None:
    async def together() -> None:
        async with keeping(one, tmp_path, CLASSIFIER, Metrics()), keeping(other, tmp_path, CLASSIFIER, Metrics()):
            for dials in (one, other):
                dials.observe("auto", {"dial": Pull(0.1 if dials is one else 0.9, None, forced=False, given=False)})

    one, other = new(), new()
    asyncio.run(together())
    assert {file.name for file in tmp_path.glob("*.json")} == {"0.json", "1.json"}
    assert kept(tmp_path, new()).states == one.states


def test_the_file_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    kept(tmp_path, observed())
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "0.lock")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        fresh_ones = kept(tmp_path, new())
        process.kill()
    assert fresh_ones.states == new().states
    assert kept(tmp_path, new()).states["auto"]["dial"].seen > 1000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"classifier": "0123456789abcdef", "dials": {"auto": {"dial": {}}}}',
        b'{"classifier": "0123456789abcdef", "dials": {"auto": {"dial": {"counts": [1]}}}}',
        b"\xff" * 100,
    ],
)
def test_a_file_that_cannot_be_read_is_replaced(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0.json").write_bytes(content)
    metrics = Metrics()
    with caplog.at_level(logging.WARNING):
        dials = kept(tmp_path, new(), metrics=metrics)
    assert dials.states == new().states
    assert "begin anew" in caplog.text
    assert b'degradations_total{part="dial"} 1.0' in metrics.exposition()
    assert set(json.loads((tmp_path / "0.json").read_bytes())) == {"classifier", "dials"}


@pytest.mark.parametrize("change", [{"counts": [-1.0] * BINS}, {"excess": "x"}, {"seen": None}, {"more": 1}])
def test_a_state_that_cannot_be_is_not_taken(tmp_path: Path, change: dict[str, object]) -> None:
    state = {**fresh().model_dump(mode="json"), **change}
    (tmp_path / "0.json").write_text(json.dumps({"classifier": CLASSIFIER, "dials": {"auto": {"dial": state}}}))
    assert kept(tmp_path, new()).states == new().states


def test_a_state_without_any_weight_does_no_harm() -> None:
    nothing = State(counts=(0.0,) * BINS, forced=0, others=0, given=0, seen=0, excess=0)
    run(Dial(THIRTY, nothing), [0.5, 0.9])


def test_another_classifier_begins_anew(tmp_path: Path) -> None:
    kept(tmp_path, observed())
    assert kept(tmp_path, new(), classifier="fedcba9876543210").states == new().states


def test_what_cannot_be_kept_is_told_and_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    metrics = Metrics()
    with caplog.at_level(logging.WARNING):
        kept(tmp_path / "file/dials", observed(), metrics=metrics)
        (tmp_path / "dials/0.new").mkdir(parents=True)
        kept(tmp_path / "dials", observed(), metrics=metrics)
    assert caplog.text.count("dials are not kept") == 2
    assert b'degradations_total{part="dial"} 2.0' in metrics.exposition()


def test_other_rules_are_other_dials(tmp_path: Path) -> None:
    kept(tmp_path, observed())
    renamed = Policy.model_validate({"rules": [{"name": "other", "share": THIRTY.model_dump()}], "default": "small"})
    dials = Dials({"auto": POLICY, "auto-best": POLICY, "auto-cheap": renamed}, Metrics())
    kept(tmp_path, dials)
    assert dials.bars("auto") == observed().bars("auto")
    assert dials.bars("auto-best") == {"dial": Dial(THIRTY).bar}
    assert dials.bars("auto-cheap") == {"other": Dial(THIRTY).bar}
    assert dials.bars("small") == {}


def test_a_changed_share_goes_on_with_what_is_known() -> None:
    dials = observed()
    half = {"name": "dial", "share": {"model": "large", "at_most": 0.5}}
    dials.configure({"auto": Policy.model_validate({"rules": [half], "default": "small"})})
    bar = dials.bars("auto")["dial"].newest
    assert bar < observed().bars("auto")["dial"].newest
    assert bar == pytest.approx(0.25, abs=0.05)


def test_metrics_tell_the_bar_and_the_share() -> None:
    metrics = Metrics()
    dials = observed(metrics=metrics)
    dials.publish()
    text = metrics.exposition().decode()
    assert f'fingerpost_dial_bar{{alias="auto",rule="dial"}} {dials.bars("auto")["dial"].newest}' in text
    assert 'fingerpost_dial_share{alias="auto",rule="dial"} 0.' in text


def test_a_bar_that_nothing_reaches() -> None:
    dial = Dial(Share(model="large", at_most=0.3, half_life=100))
    for _ in range(100):
        dial.observe(Pull(0.5, None, forced=True, given=True))
    assert dial.bar == SHUT
    assert Bar(0.5, 0.4) != SHUT
