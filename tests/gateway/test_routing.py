"""Routing through the whole gateway, over stubs of Triton and vLLM: what the policy sees, and what vLLM is sent.

The stub of Triton finds n words as complex as n / (n + 50), and the category is the first label in the text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.tenants import digest
from tests.conftest import Server, StartGateway, Tree, chat, models, wait_until

LONG = "word " * 60  # complexity 0.545
HARD = {"name": "hard", "when": {"complexity": {"at_least": 0.5}}, "model": "smollm2-large"}
NOISE = f"<system-reminder>{LONG}</system-reminder>"


@pytest.fixture(scope="module")
def start(start_gateway: StartGateway, stub_triton: Tree, stub: Server) -> Any:
    """Starts a gateway with these policies by alias; further changes are of the configuration."""

    def started(policies: Tree, **changes: Any) -> Server:
        policy = policies.pop("auto", {"default": "smollm2-small", "rules": []})
        tree = {
            "triton": stub_triton,
            "models": models(stub.url),
            "policy": policy,
            "policies": policies,
            "semantic_cache": {"backend_type": "memory"},
            "local": {},
        }
        return start_gateway({**tree, **changes})

    return started


@pytest.fixture(scope="module")
def gateway(start: Any) -> Server:
    small_only = {"default": "smollm2-small", "rules": []}
    brief = {
        "name": "brief",
        "when": {"keywords": ["briefly"]},
        "model": "smollm2-small",
        "system_prompt": {"prepend": "Be brief."},
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
        "max_tokens": 100,
    }
    thorough = {"name": "thorough", "model": "smollm2-large", "system_prompt": {"replace": "Be thorough."}}
    pictures = {"name": "pictures", "when": {"has_images": True}, "model": "smollm2-small"}
    gateway: Server = start(
        {
            "auto": {"default": "smollm2-small", "rules": [HARD]},
            "auto-cheap": small_only,
            "auto-brief": {"default": "smollm2-small", "rules": [brief, thorough]},
            "auto-seeing": {"default": "smollm2-small", "rules": [pictures, HARD]},
        }
    )
    return gateway


def described(gateway: Server, *said: Any, **fields: Any) -> Any:
    """What /v1/route says of a conversation of these user turns."""
    turns = [
        turn for text in said for turn in ({"role": "user", "content": text}, {"role": "assistant", "content": "Ok"})
    ]
    body = {"model": "auto", "messages": turns[:-1], **fields}
    response = httpx.post(f"{gateway.url}/v1/route", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def sent(stub: Server) -> Any:
    return httpx.get(f"{stub.url}/stub").json()["received"][-1]["body"]


def outcome(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.headers["x-fingerpost-cache"])


# Aliases


def test_aliases_are_models_that_can_be_asked_for(gateway: Server) -> None:
    listed = [model["id"] for model in httpx.get(f"{gateway.url}/v1/models").json()["data"]]
    assert listed == ["auto", "auto-brief", "auto-cheap", "auto-seeing", "smollm2-small", "smollm2-large"]
    assert httpx.get(f"{gateway.url}/v1/models/auto-cheap").json()["owned_by"] == "fingerpost"
    assert described(gateway, LONG)["model"] == "smollm2-large"
    assert described(gateway, LONG, model="auto-cheap")["model"] == "smollm2-small"
    unknown = chat(gateway.url, model="auto-dear")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "auto-cheap" in unknown.json()["error"]["message"]


def test_an_answer_of_one_alias_is_not_another_s(gateway: Server) -> None:
    assert outcome(chat(gateway.url, "Which alias is this?")) == "miss"
    assert outcome(chat(gateway.url, "Which alias is this?", model="auto-cheap")) == "miss"
    assert outcome(chat(gateway.url, "Which alias is this?", model="auto-cheap")) == "hit-exact"


# Conversations


def test_a_follow_up_stays_with_its_conversation(gateway: Server) -> None:
    assert described(gateway, "and in French?")["model"] == "smollm2-small"
    told = described(gateway, LONG, "Thanks", "and in French?")
    assert (told["model"], told["rule"]) == ("smollm2-large", "hard")
    assert told["complexity"] > 0.5  # it was read with what was before it


def test_a_follow_up_that_is_easy_by_itself_does_not_fall(gateway: Server) -> None:
    easy = "x" * 1000  # fills what is read, so that it is read alone
    told = described(gateway, LONG, easy)
    assert told["complexity"] < 0.1
    assert told["model"] == "smollm2-large"
    assert told["reason"].startswith(
        "an earlier turn of the conversation is given it by hard: its rule holds (complexity"
    )
    assert told["reason"].endswith("this turn alone would be given smollm2-small by default")


def test_a_conversation_goes_to_the_model_that_sees_when_there_is_a_picture(gateway: Server) -> None:
    """Although an earlier turn, in words alone, was given a larger one."""
    picture = [{"type": "text", "text": "And this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    assert described(gateway, LONG, "And this?", model="auto-seeing")["rule"] == "hard"
    told = described(gateway, LONG, picture, model="auto-seeing")
    assert (told["model"], told["rule"]) == ("smollm2-small", "pictures")
    assert described(gateway, LONG, picture, "And that?", model="auto-seeing")["rule"] == "pictures"


def test_tools_whose_schema_gives_several_types_are_counted(gateway: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": ["object", "null"]}}}
    assert described(gateway, "Hello", tools=[tool])["model"] == "smollm2-small"


def test_what_a_harness_adds_does_not_decide(gateway: Server, stub: Server) -> None:
    text = f"Commit it. {NOISE}"
    assert described(gateway, text)["model"] == "smollm2-small"
    response = chat(gateway.url, text)
    assert response.headers["x-fingerpost-model"] == "smollm2-small"
    assert sent(stub)["messages"] == [{"role": "user", "content": text}]


def test_the_cache_compares_what_came_and_not_what_was_read(start: Any) -> None:
    gateway = start({})
    assert outcome(chat(gateway.url, f"Which noise? {NOISE}")) == "miss"
    assert outcome(chat(gateway.url, "Which noise?")) == "miss"
    assert outcome(chat(gateway.url, f"Which noise? {NOISE}")) == "hit-exact"
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
    for first_turn, expected in (("Which one here?", "miss"), ("one here, which?", "hit-semantic")):
        asked = {"role": "user", "content": first_turn}
        assert outcome(chat(gateway.url, messages=[*before, asked])) == expected
    assert outcome(chat(gateway.url, "Which one here?")) == "miss"


def test_a_conversation_is_read_in_one_round_trip(gateway: Server) -> None:
    def trips() -> float:
        text = httpx.get(f"{gateway.url}/metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith("fingerpost_router_seconds_count")]
        return float(line.split()[1])

    said = [f"turn number {i} of a long talk" for i in range(20)]
    before = trips()
    described(gateway, *said)
    assert trips() == before + 1
    described(gateway, *said)
    assert trips() == before + 1  # all of it is known


# What rules change


def test_what_a_rule_changes_is_sent_and_told(gateway: Server, stub: Server) -> None:
    response = chat(gateway.url, "Tell me briefly.", model="auto-brief", max_tokens=500, seed=3)
    assert response.headers["x-fingerpost-rule"] == "brief"
    assert sent(stub) == {
        "model": "smollm2-small",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me briefly."}],
        "max_tokens": 100,
        "seed": 3,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert described(gateway, "Tell me briefly.", model="auto-brief")["overrides"] == {
        "system_prompt": {"prepend": "Be brief."},
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
        "max_tokens": 100,
    }
    assert described(gateway, "Tell me.")["overrides"] == {}


def test_a_named_model_is_sent_nothing_of_rules(gateway: Server, stub: Server) -> None:
    chat(gateway.url, "Tell me briefly, you.", model="smollm2-small")
    assert "reasoning_effort" not in sent(stub)


def test_answers_of_other_rules_are_not_shared(gateway: Server) -> None:
    """The same words in another order mean the same to the stub, and each is a rule's own."""
    ask = {"model": "auto-brief"}
    assert outcome(chat(gateway.url, "Please say all of it to me briefly here.", **ask)) == "miss"
    assert outcome(chat(gateway.url, "Please say all of it to me briefly here.", **ask)) == "hit-exact"
    assert outcome(chat(gateway.url, "Here please say briefly all of it to me.", **ask)) == "hit-semantic"
    near = chat(gateway.url, "Please say all of it to me brieflyish here.", **ask)
    assert (outcome(near), near.headers["x-fingerpost-rule"]) == ("miss", "thorough")


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (
            "/v1/responses",
            {"input": "Tell me briefly.", "instructions": "Smile.", "max_output_tokens": 500},
            {"instructions": "Be brief.\n\nSmile.", "max_output_tokens": 100, "reasoning": {"effort": "low"}},
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "Tell me briefly."}], "max_tokens": 500},
            {"system": "Be brief.", "max_tokens": 100, "output_config": {"effort": "low"}},
        ),
        ("/v1/completions", {"prompt": "Tell me briefly.", "max_tokens": 500}, {"max_tokens": 100}),
    ],
)
def test_what_a_rule_changes_in_the_other_forms(
    gateway: Server, stub: Server, path: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    response = httpx.post(f"{gateway.url}{path}", json={"model": "auto-brief", **body})
    assert response.headers["x-fingerpost-rule"] == "brief"
    received = sent(stub)
    assert {key: received[key] for key in expected} == expected


# What a rule may look at


@pytest.fixture(scope="module")
def looking(start: Any) -> Server:
    rules = [
        {"name": "pictures", "when": {"has_images": True}, "model": "smollm2-large"},
        {"name": "tools", "when": {"has_tools": True}, "model": "smollm2-large"},
        {"name": "sql", "when": {"regex": [r"(?i)^\s*(select|insert)\b"]}, "model": "smollm2-large"},
        {
            "name": "sure-math",
            "when": {"all": [{"category": ["math"], "min_confidence": 0.7}, {"not": {"keywords": ["easy"]}}]},
            "model": "smollm2-large",
        },
        {"name": "surer-code", "when": {"category": ["code"], "min_confidence": 0.9}, "model": "smollm2-large"},
    ]
    gateway: Server = start({"auto": {"default": "smollm2-small", "rules": rules}})
    return gateway


@pytest.mark.parametrize(
    ("content", "fields", "rule", "reason"),
    [
        ("Hello", {}, "default", "no rule holds"),
        ("Hello", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "its rule holds (tools)"),
        (
            [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
            {},
            "pictures",
            "its rule holds (images)",
        ),
        ("SELECT 1", {}, "sql", "its rule holds (match of the regex '(?i)^\\\\s*(select|insert)\\\\b')"),
        ("a math question", {}, "sure-math", "its rule holds (category math (0.800), none of the keywords)"),
        ("an easy math question", {}, "default", "no rule holds"),
        ("a code question", {}, "default", "no rule holds"),
    ],
)
def test_what_rules_look_at(looking: Server, content: Any, fields: dict[str, Any], rule: str, reason: str) -> None:
    told = described(looking, content, **fields)
    assert (told["rule"], told["reason"]) == (rule, reason)


def test_a_rule_for_a_tenant(start: Any) -> None:
    keys = {"acme": "fp-acme", "umbrella": "fp-umbrella"}
    tenants = [{"name": name, "key_sha256": [digest(key)]} for name, key in keys.items()]
    rule = {"name": "vip", "when": {"tenant": ["acme"]}, "model": "smollm2-large"}
    gateway = start({"auto": {"default": "smollm2-small", "rules": [rule]}}, tenants=tenants)
    for name, expected in (("acme", "vip"), ("umbrella", "default")):
        assert chat(gateway.url, "Who am I?", tenant=keys[name]).headers["x-fingerpost-rule"] == expected


# The window


def test_what_does_not_fit_goes_to_a_larger_window(start: Any, stub: Server) -> None:
    small, large = models(stub.url)
    policy = {"default": "smollm2-small", "rules": []}
    wide = start({"auto": policy}, models=[{**small, "context_window": 100}, {**large, "context_window": 1000}])
    assert described(wide, "Hello")["model"] == "smollm2-small"
    told = described(wide, "Hello", max_tokens=100)
    assert told["model"] == "smollm2-large"
    assert "do not fit into the 100 of smollm2-small" in told["reason"]
    assert described(wide, "x" * 500)["model"] == "smollm2-large"
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 500}}]
    assert described(wide, "Hello", tools=tools)["model"] == "smollm2-large"
    none = described(wide, "x" * 5000)
    assert none["model"] == "smollm2-large"
    assert "smollm2-large has the largest window of all" in none["reason"]
    httpx.post(f"{stub.url}/stub", json={"fault": "status-400"})
    try:
        refused = chat(wide.url, "x" * 5000)
    finally:
        httpx.post(f"{stub.url}/stub", json={"fault": "none"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "stub says no")


# The dial


def test_a_share_holds_through_the_gateway_and_a_restart(start: Any, tmp_path: Path) -> None:
    """Questions of 1 to 400 words, thrice as long from the middle on; a fifth is the large model's."""
    share = {"name": "dial", "share": {"model": "smollm2-large", "at_most": 0.2, "half_life": 100}}
    policy = {"auto": {"default": "smollm2-small", "rules": [share]}}
    changes = {"data_dir": str(tmp_path), "semantic_cache": {"enabled": False}}

    def large(gateway: Server, factor: int) -> list[bool]:
        lengths = [(i * 37 % 130 + 1) * factor for i in range(300)]
        answers = [chat(gateway.url, f"{i} " + "w " * length) for i, length in enumerate(lengths)]
        return [answer.headers["x-fingerpost-rule"] == "dial" for answer in answers]

    first = start(dict(policy), **changes)
    for _ in range(3):
        described(first, "w " * 500)  # asking what would be done is not doing it
    given = large(first, 1)
    figures = httpx.get(f"{first.url}/metrics").text
    assert 'fingerpost_dial_share{alias="auto",rule="dial"} 0.' in figures
    first.process.terminate()
    first.process.wait(15)
    wait_until("the file", lambda: (tmp_path / "dials/0.json").exists())
    kept = json.loads((tmp_path / "dials/0.json").read_text())["dials"]["auto"]["dial"]
    assert 0 < kept["seen"] < 145
    second = start(dict(policy), **changes)
    bar = [
        line for line in httpx.get(f"{second.url}/metrics").text.splitlines() if line.startswith("fingerpost_dial_bar")
    ]
    assert bar == [line for line in figures.splitlines() if line.startswith("fingerpost_dial_bar")]
    given += large(second, 3)
    assert sum(given[:300]) / 300 == pytest.approx(0.2, abs=0.04)
    assert sum(given[300:]) / 300 == pytest.approx(0.2, abs=0.04)
    told = described(second, "w " * 900)
    assert told["reason"].startswith("its complexity (0.947) is among the highest 20 %, which begin at 0.")


# Triton is down


def test_without_triton_a_conversation_keeps_what_its_words_say(start: Any, stub_triton: Tree) -> None:
    asked = {"name": "asked", "when": {"keywords": ["carefully"]}, "model": "smollm2-large"}
    not_math = {"name": "not-math", "when": {"not": {"category": ["math"]}}, "model": "smollm2-large"}
    policy = {"default": "smollm2-small", "rules": [asked, not_math]}
    assert described(start({"auto": policy}), "Hello")["rule"] == "not-math"
    down = start({"auto": policy}, triton={**stub_triton, "address": "127.0.0.1:9"})
    assert described(down, "Hello")["rule"] == "default"
    assert described(down, "Look carefully.", "Thanks")["rule"] == "asked"
