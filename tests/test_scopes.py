"""`python -m bench.scopes`: a small run finds nothing wrong, and what would be wrong is found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from bench.scope_checks import Broken, Received, Sent, Unavailable, judged, received, refused
from bench.scope_requests import MEANINGS, SMALL, TENANTS, TIMELY, Asked, Conversation, Requests, spellings
from bench.scope_stub import KINDS, Label, digest, frames, opened, scope, sealed, text_of, usage
from gateway.cacheable import is_timely
from tests.conftest import ROOT
from tests.stub_triton import verifier

SERVED = 1.0  # the score from which on the stub verifier's word is taken, see tests/stub_triton.py
PLAIN = {"tools": 0, "format": 0, "sampling": 0}
CONVERSATION = Conversation(fields=PLAIN)


def asked(**changes: Any) -> Asked:
    question = changes.setdefault("question", MEANINGS[0][0])
    conversation = changes.setdefault("conversation", CONVERSATION)
    given = {"tenant": TENANTS[0], "meaning": 0, "body": conversation.body(question)}
    return Asked(**{**given, **changes})


def sent(id: str, **changes: Any) -> Sent:
    return Sent(id, asked(**changes), "gateway-a", 100.0, 101.0)


def answer_to(origin: Sent, **headers: str) -> Received:
    """The answer that was generated for a request, as it is given to another one with these headers."""
    body = origin.asked.upstream(SMALL)
    text = sealed(Label(scope(body), digest(origin.asked.question), origin.id, 1, SMALL, 100.0), "text")
    reason = "length" if origin.asked.kind == "length" else "stop"
    return Received(text, SMALL, reason, usage(text), {"x-fingerpost-model": SMALL, **headers})


def found(mine: Sent, origin: Sent, outcome: str, **changes: Any) -> set[str]:
    """The kinds of violations when this request gets the answer to that one."""
    headers = {"x-fingerpost-cache": outcome, "x-request-id": mine.id}
    got = replace(answer_to(origin, **headers), **changes)
    return {kind for kind, _ in judged(mine, got, {mine.id: mine, origin.id: origin})}


# What the clients check


def test_what_is_right_is_no_violation() -> None:
    first, other = sent("1-plain"), sent("2-plain", question=MEANINGS[0][1])
    assert found(first, first, "miss") == set()
    assert found(sent("3-plain"), first, "hit-exact") == set()
    assert found(sent("3-plain"), first, "joined") == set()
    assert found(other, first, "hit-semantic") == set()


OTHERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "of another tenant": ("tenant", {"tenant": TENANTS[1]}),
    "of another system prompt": ("scope", {"conversation": Conversation(fields=PLAIN, system="You are a pirate.")}),
    "of other earlier turns": ("scope", {"conversation": Conversation(fields=PLAIN, turns=(0,))}),
    "with tools": ("scope", {"conversation": Conversation(fields={**PLAIN, "tools": 2})}),
    "of another form": ("scope", {"conversation": Conversation(fields={**PLAIN, "format": 3})}),
    "drawn otherwise": ("scope", {"conversation": Conversation(fields={**PLAIN, "sampling": 1})}),
    "of another name of the model": ("scope", {"conversation": Conversation(SMALL, fields=PLAIN)}),
    "of another wording": ("question", {"question": MEANINGS[0][1]}),
    "not to be stored": ("replayed", {"control": "no-store"}),
    "cut": ("replayed", {"kind": "length"}),
    "broken off": ("replayed", {"kind": "break"}),
    "of today": ("replayed", {"meaning": -1}),
    "expired": ("expired", {"control": "ttl=1"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_another_s_is_found(name: str) -> None:
    kind, theirs = OTHERS[name]
    mine, origin = sent("2-plain"), sent(f"1-{theirs.get('kind', 'plain')}", **theirs)
    mine.started = 110.0
    assert kind in found(mine, origin, "hit-exact")


def test_a_trap_is_found() -> None:
    origin = sent("1-plain", question=MEANINGS[3][0], meaning=3)
    assert found(sent("2-plain", question=MEANINGS[2][0], meaning=2), origin, "hit-semantic") == {"question"}


def test_what_a_request_does_not_allow_is_found() -> None:
    origin = sent("1-plain")
    assert found(sent("2-plain", control="no-cache"), origin, "hit-exact") == {"replayed"}
    assert "replayed" in found(sent("2-plain", meaning=-1), origin, "hit-exact")
    assert found(sent("2-plain"), origin, "miss") == {"foreign"}
    assert found(origin, origin, "hit-exact") == {"foreign"}


def test_a_stream_that_is_read_while_it_comes_may_turn_out_to_be_cut() -> None:
    origin = sent("1-length", kind="length")
    streaming = sent("2-plain", body={**CONVERSATION.body(MEANINGS[0][0]), "stream": True})
    assert found(streaming, origin, "joined") == set()
    assert found(streaming, origin, "hit-exact") == {"replayed"}
    assert found(sent("3-plain"), origin, "joined") == {"replayed"}


def test_what_is_not_whole_is_found() -> None:
    one = sent("1-plain")
    whole = answer_to(one).content
    assert found(one, one, "miss", content=whole[:-1]) == {"partial"}
    assert found(one, one, "miss", content=whole[:50] + whole[51:]) == {"partial"}
    assert found(one, one, "miss", finish_reason=None) == {"partial"}
    assert found(one, one, "miss", usage={**usage(whole), "prompt_tokens": 1}) == {"partial"}


def test_a_refusal_that_nobody_asked_for_is_found() -> None:
    assert [kind for kind, _ in refused(sent("1-plain"), 500)] == ["refused"]
    assert list(refused(sent("1-failed", kind="failed"), 500)) == []
    with pytest.raises(Unavailable):
        list(refused(sent("1-plain"), 503))


# What they ask, and what the stub answers


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_put_together_or_seen_to_be_broken(kind: str) -> None:
    body = {"model": SMALL, "messages": [], "stream_options": {"include_usage": True}}
    label = Label("scope", "question", f"1-{kind}", 1, SMALL, 100.0)
    answer = sealed(label, text_of(kind, 1))
    raw = b"".join(frames(body, kind, answer))
    if kind in ("break", "unended", "error"):
        with pytest.raises(Broken):
            received(raw, {}, streams=True)
        return
    got = received(raw, {}, streams=True)
    assert got == Received(answer, SMALL, "length" if kind == "length" else "stop", usage(answer), {})
    assert opened(got.content) == label


def test_the_stub_verifier_takes_no_question_for_another() -> None:
    """So that a trap that is served is a fault of the gateway."""
    for some, others in combinations(MEANINGS, 2):
        pairs = list(product(*([each for text in texts for each in spellings(text)] for texts in (some, others))))
        scores = verifier([one for one, _ in pairs], [other for _, other in pairs])["score"]
        assert scores.max() < SERVED, pairs[scores.argmax()]
    assert all(verifier([some[0]], [some[1]])["score"] >= SERVED for some in MEANINGS)


def test_only_some_questions_depend_on_when_they_are_asked() -> None:
    assert all(map(is_timely, TIMELY))
    assert not any(is_timely(text) for meaning in MEANINGS for text in meaning)


def test_the_same_seed_asks_the_same() -> None:
    one, same, other = Requests(1), Requests(1), Requests(2)
    first = [one.next() for _ in range(300)]
    assert first == [same.next() for _ in range(300)]
    assert first != [other.next() for _ in range(300)]
    bodies = [json.dumps(asked.upstream(SMALL)) for some in first for asked in some]
    assert len(set(bodies)) > 100


# The run


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.scopes", "--stub-triton", "--data", str(folder / "data"), *arguments]
    results = ("--results", str(folder / "scopes.md"))
    return subprocess.run([*command, *results], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)


def figures(ended: subprocess.CompletedProcess[str]) -> dict[str, int]:
    rows = re.findall(r"^\| (?:… )?\**(.+?)\** \| \**([\d,]+)\** \|$", ended.stdout, re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in rows}


def test_nobody_gets_what_is_not_his(tmp_path: Path) -> None:
    ended = run(tmp_path, "--requests", "1500")
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    told = figures(ended)
    assert told["violations"] == 0
    assert told["requests"] >= 1500
    assert told["events"] == 4
    for outcome in ("hit-exact", "hit-semantic", "joined", "miss", "bypass", "left", "broken, as told"):
        assert told[outcome] > 0, told
    assert "| **violations** | **0** |" in (tmp_path / "scopes.md").read_text()


def test_wrong_answers_are_seen(tmp_path: Path) -> None:
    ended = run(tmp_path, "--requests", "150", "--events", "off", "--wrong")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    told = figures(ended)
    assert told["scope"] > 0
    assert told["partial"] > 0
    assert "VIOLATION scope" in ended.stdout
