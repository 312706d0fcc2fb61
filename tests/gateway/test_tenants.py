"""Tenants: keys, what they may ask for, and how much; the limits with a clock of the test's own, the rest over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import ConfigError, Tenant, load
from gateway.errors import LimitReached, ModelNotAllowed, Unauthenticated
from gateway.tenants import Account, Admission, Tenants, digest, duration, matches, new_key, offered_key
from gateway.usage import total, usage
from tests.conftest import (
    ROOT,
    Server,
    StartGateway,
    Tree,
    before_stubs,
    chat,
    events,
    merged,
    shipped,
    wait_until,
)

Ask = Callable[..., httpx.Response]

KEY, OTHER = "fp-one", "fp-two"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tenant(**fields: Any) -> Tenant:
    return Tenant.model_validate({"name": "search", "key_sha256": [digest(KEY)], **fields})


def account(clock: Clock, **limits: Any) -> Account:
    return Account(tenant(**limits), clock)


def admit(account: Account) -> Admission:
    return account.admit(counted=True)


# Keys


def test_a_new_key_is_long_and_another_every_time() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {len("fp-") + 64}


def test_the_digest_is_sha256() -> None:
    assert digest(KEY) == hashlib.sha256(b"fp-one").hexdigest()
    assert matches(KEY, digest(KEY))
    assert not matches(KEY, digest(OTHER))


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer fp-one")], "fp-one"),
        ([(b"authorization", b"bearer  fp-one ")], "fp-one"),
        ([(b"x-api-key", b"fp-one")], "fp-one"),
        ([(b"x-api-key", b"fp-one"), (b"authorization", b"Bearer fp-one")], "fp-one"),
        ([(b"authorization", b"Basic fp-one")], None),
        ([(b"authorization", b"fp-one")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"x-api-key", b"")], None),
        ([(b"x-api-key", b""), (b"authorization", b"Bearer fp-one")], "fp-one"),
        ([(b"x-api-key", b"\xe4\xff")], "äÿ"),
        ([], None),
    ],
)
def test_where_a_key_is_looked_for(headers: list[tuple[bytes, bytes]], key: str | None) -> None:
    assert offered_key(headers) == key


@pytest.mark.parametrize(
    "second", [(b"x-api-key", b"fp-two"), (b"authorization", b"Bearer fp-two")], ids=["x-api-key", "authorization"]
)
def test_two_keys_are_one_too_many(second: tuple[bytes, bytes]) -> None:
    with pytest.raises(Unauthenticated, match="two different"):
        offered_key([(b"authorization", b"Bearer fp-one"), second])


def test_all_keys_of_a_tenant_are_one_account(clock: Clock) -> None:
    tenants = Tenants([tenant(key_sha256=[digest(KEY), digest(OTHER)])], clock)
    assert tenants.account([(b"x-api-key", KEY.encode())]) is tenants.account([(b"x-api-key", OTHER.encode())])


@pytest.mark.parametrize("headers", [[], [(b"x-api-key", b"fp-three")], [(b"x-api-key", digest(KEY).encode())]])
def test_another_key_is_nobody_s(clock: Clock, headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Unauthenticated):
        Tenants([tenant()], clock).account(headers)


def test_without_tenants_anybody_may_do_anything(clock: Clock) -> None:
    anybody = Tenants([], clock).account([])
    admission = admit(anybody)
    admission.check_model("any")
    admission.reserve(10**9)
    assert admission.tenant is None
    assert anybody.headers() == {}


# Models


def test_only_the_models_that_are_named() -> None:
    admission = Admission(Account(tenant(models=["auto", "small"])))
    admission.check_model("auto")
    with pytest.raises(ModelNotAllowed, match="'large'"):
        admission.check_model("large")


def test_all_models_when_none_is_named() -> None:
    assert Admission(Account(tenant())).allows("large")


# Limits


def test_requests_per_minute(clock: Clock) -> None:
    limited = account(clock, requests_per_minute=6)
    for _ in range(6):
        admit(limited)
    with pytest.raises(LimitReached) as caught:
        admit(limited)
    assert caught.value.headers == {"Retry-After": "10"}
    assert caught.value.type == "requests"
    clock.now += 10
    admit(limited)
    with pytest.raises(LimitReached):
        admit(limited)


def test_what_is_not_used_does_not_pile_up(clock: Clock) -> None:
    limited = account(clock, requests_per_minute=2)
    clock.now += 3600
    admit(limited)
    admit(limited)
    with pytest.raises(LimitReached):
        admit(limited)


def test_looking_costs_nothing(clock: Clock) -> None:
    limited = account(clock, requests_per_minute=1, concurrent_requests=1)
    for _ in range(10):
        limited.admit(counted=False).end(failed=False)
    admit(limited)


def test_requests_at_once(clock: Clock) -> None:
    limited = account(clock, concurrent_requests=2, requests_per_minute=3)
    first = admit(limited)
    admit(limited)
    with pytest.raises(LimitReached, match="at once"):
        admit(limited)
    first.end(failed=True)
    admit(limited)  # the one that was refused has cost nothing


def test_tokens_are_reserved_and_then_corrected(clock: Clock) -> None:
    limited = account(clock, tokens_per_minute=100)
    admission = admit(limited)
    admission.reserve(40)
    assert limited.headers()["x-ratelimit-remaining-tokens"] == "60"
    admission.read(b'{"usage": {"prompt_tokens": 30, "completion_tokens": 25, "total_tokens": 55}}')
    admission.end(failed=False)
    assert limited.headers()["x-ratelimit-remaining-tokens"] == "45"


def test_an_answer_dearer_than_thought_leaves_a_debt(clock: Clock) -> None:
    limited = account(clock, tokens_per_minute=60)
    admission = admit(limited)
    admission.reserve(10)
    admission.spent(120)
    assert limited.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(LimitReached) as caught:
        admit(limited).reserve(0)
    assert caught.value.headers == {"Retry-After": "61"}
    assert caught.value.type == "tokens"
    clock.now += 61
    admit(limited).reserve(1)


def test_what_failed_or_was_replayed_costs_no_tokens(clock: Clock) -> None:
    limited = account(clock, tokens_per_minute=100)
    failed, replayed = admit(limited), admit(limited)
    failed.reserve(40)
    replayed.reserve(40)
    failed.end(failed=True)
    replayed.spent(0)
    replayed.end(failed=False)
    assert limited.headers()["x-ratelimit-remaining-tokens"] == "100"


def test_an_answer_that_tells_no_usage_counts_its_pieces(clock: Clock) -> None:
    limited = account(clock, tokens_per_minute=100)
    admission = admit(limited)
    admission.reserve(10)
    for _ in range(25):
        admission.read(b'{"choices": [{"delta": {"content": "word"}}], "usage": null}')
    admission.end(failed=False)
    assert limited.headers()["x-ratelimit-remaining-tokens"] == "65"


def test_a_prompt_that_no_minute_allows_is_not_worth_another_try(clock: Clock) -> None:
    with pytest.raises(LimitReached, match="about 101 tokens") as caught:
        admit(account(clock, tokens_per_minute=100)).reserve(101)
    assert caught.value.headers == {"x-should-retry": "false"}


@settings(deadline=None)
@given(steps=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 20)), max_size=60))
def test_no_minute_has_more_than_twice_its_limit(steps: list[tuple[float, int]]) -> None:
    """A full bucket, and what comes back in a minute."""
    clock, limit = Clock(), 10
    taken: list[float] = []
    waits: list[int] = []
    limited = Account(tenant(requests_per_minute=limit), clock)
    for seconds, tries in steps:
        clock.now += seconds
        for _ in range(tries):
            try:
                admit(limited)
            except LimitReached as error:
                waits.append(int(error.headers["Retry-After"]))
            else:
                taken.append(clock.now)
    assert all(1 <= seconds <= 60 for seconds in waits)
    assert all(sum(begin <= at < begin + 60 for at in taken) <= 2 * limit for begin in taken)


def test_the_headers_are_openai_s(clock: Clock) -> None:
    limited = account(clock, requests_per_minute=60, tokens_per_minute=6000)
    admit(limited).reserve(3000)
    assert limited.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "3000",
        "x-ratelimit-reset-tokens": "30s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0171, "18ms"), (1, "1s"), (1.52, "1.6s"), (60, "1m0s"), (359.2, "6m0s")]
)
def test_a_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("piece", "tokens"),
    [
        (b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}', 7),
        (b'{"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}, "total_tokens": 3}}', 3),
        (b'{"type": "response.completed", "response": {"usage": {"input_tokens": 5, "output_tokens": 6}}}', 11),
        (b'{"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}', 0),
        (b'{"type": "message_delta", "usage": {"output_tokens": 9}}', 9),
        (b'{"usage": {"total_tokens": -5}}', 0),
        (b'{"usage": {"total_tokens": true}}', 0),
        (b'{"usage": 7}', 0),
        (b'["usage"]', 0),
        (b'{"usage": {', 0),
        (b"[DONE]", 0),
    ],
)
def test_what_an_answer_took(piece: bytes, tokens: int) -> None:
    assert total(usage(piece)) == tokens


def test_anthropic_s_figures_come_in_two_events(clock: Clock) -> None:
    admission = admit(account(clock, tokens_per_minute=100))
    admission.read(b'{"type":"message_start","message":{"usage":{"input_tokens":5,"output_tokens":1}}}')
    admission.read(b'{"type":"message_delta","usage":{"output_tokens":9}}')
    admission.end(failed=False)
    assert admission.tokens == 14


def test_an_answer_that_was_broken_off_is_not_billed_by_what_its_first_event_says(clock: Clock) -> None:
    admission = admit(account(clock, tokens_per_minute=100))
    admission.reserve(5)
    admission.read(b'{"type":"message_start","message":{"usage":{"input_tokens":6,"output_tokens":1}}}')
    for _ in range(20):
        admission.read(b'{"type":"content_block_delta","delta":{"type":"text_delta","text":"word"}}')
    admission.end(failed=False)
    assert admission.tokens == 6 + 21


def test_an_answer_that_was_broken_off_is_billed_by_its_length(clock: Clock) -> None:
    """However few events a client has vLLM send it in."""
    admission = admit(account(clock, tokens_per_minute=1000))
    admission.reserve(5)
    admission.read(orjson.dumps({"choices": [{"delta": {"content": "word " * 400}}]}))
    admission.end(failed=False)
    assert 400 < admission.tokens < 600


PIECE = b'{"choices": [{"delta": {"content": "word"}}], "usage": null}'
TOLD = b'{"usage": {"prompt_tokens": 30, "completion_tokens": 25, "total_tokens": 55}}'


@pytest.mark.parametrize(("before", "at_the_end"), [([], 10), ([PIECE] * 2, 12), ([TOLD], 55)])
def test_what_others_read_on_when_a_request_has_ended_is_charged_to_it(
    clock: Clock, before: list[bytes], at_the_end: int
) -> None:
    limited = account(clock, tokens_per_minute=100)
    admission = admit(limited)
    admission.reserve(10)
    for piece in before:
        admission.read(piece)
    admission.end(failed=False)
    assert admission.tokens == at_the_end
    for _ in range(3):
        admission.read(PIECE)
    admission.read(TOLD)
    assert (admission.over(), admission.over()) == (55 - at_the_end, 0)
    assert limited.headers()["x-ratelimit-remaining-tokens"] == "45"


def test_the_prompt_is_charged_once_however_often_the_pieces_are(clock: Clock) -> None:
    admission = admit(account(clock, tokens_per_minute=100))
    admission.reserve(10)
    for _ in range(3):
        admission.read(PIECE)
    assert admission.over() == 0  # not before its end
    admission.end(failed=False)
    for _ in range(4):
        admission.read(PIECE)
    assert (admission.over(), admission.tokens) == (4, 17)


# The command


def test_the_command_makes_a_key_and_its_digest() -> None:
    command = [sys.executable, "-m", "gateway", "key"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = dict(line.split() for line in printed.splitlines())
    assert values.keys() == {"key:", "key_sha256:"}
    assert digest(values["key:"]) == values["key_sha256:"]


# Over HTTP

NAMES = ("team", "team-too", "other", "small", "reader", "slow", "few", "metered", "leaver")
KEYS = {name: f"fp-{name}" for name in NAMES}
TENANTS: list[Tree] = [
    {"name": "team", "key_sha256": [digest(KEYS["team"]), digest(KEYS["team-too"])]},
    {"name": "other", "key_sha256": [digest(KEYS["other"])]},
    {"name": "small", "key_sha256": [digest(KEYS["small"])], "models": ["auto", "smollm2-small"]},
    {"name": "reader", "key_sha256": [digest(KEYS["reader"])], "models": ["embedder"]},
    {"name": "slow", "key_sha256": [digest(KEYS["slow"])], "concurrent_requests": 1},
    {"name": "few", "key_sha256": [digest(KEYS["few"])], "requests_per_minute": 2},
    {"name": "metered", "key_sha256": [digest(KEYS["metered"])], "tokens_per_minute": 1000},
    {"name": "leaver", "key_sha256": [digest(KEYS["leaver"])]},
]


@pytest.fixture(scope="module")
def gateway(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(
        {
            **before_stubs(stub.url, stub_triton),
            "tenants": TENANTS,
        }
    )


@pytest.fixture
def ask(gateway: Server, stub: Server) -> Ask:
    httpx.post(f"{stub.url}/stub", json={"fault": "none"}).raise_for_status()
    return lambda who, text="What is a gnu?", **fields: chat(gateway.url, text, tenant=KEYS[who], **fields)


def client(gateway: Server, who: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEYS[who], max_retries=0)


def metric(gateway: Server, name: str) -> float:
    lines = httpx.get(f"{gateway.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/route", "/v1/embeddings", "/v1/nothing", "/nothing"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer fp-wrong"}, {"x-api-key": "fp-wrong"}])
def test_without_a_key_nothing_is_answered(gateway: Server, path: str, headers: dict[str, str]) -> None:
    response = httpx.post(gateway.url + path, content=b"not even JSON", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert "fp-wrong" not in response.text


def test_health_needs_no_key(gateway: Server) -> None:
    assert httpx.get(f"{gateway.url}/health").status_code == 200


def test_both_headers_carry_a_key(ask: Ask, gateway: Server) -> None:
    assert ask("team").status_code == 200
    listed = httpx.get(f"{gateway.url}/v1/models", headers={"x-api-key": KEYS["team"]})
    assert [model["id"] for model in listed.json()["data"]] == ["auto", "smollm2-small", "smollm2-large"]


def test_keys_of_a_tenant_share_answers_and_tenants_never_do(ask: Ask) -> None:
    question = "Which tenant asks this?"
    outcomes = [ask(who, question).headers["x-fingerpost-cache"] for who in ("team", "team-too", "other", "other")]
    assert outcomes == ["miss", "hit-exact", "miss", "hit-exact"]
    meant = "this asks Which tenant?"
    assert ask("team-too", meant).headers["x-fingerpost-cache"] == "hit-semantic"
    assert ask("small", meant).headers["x-fingerpost-cache"] == "miss"


def test_only_allowed_models_are_served_and_shown(ask: Ask, gateway: Server) -> None:
    headers = {"Authorization": f"Bearer {KEYS['small']}"}
    refused = ask("small", model="smollm2-large")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    assert refused.json()["error"]["param"] == "model"
    assert ask("small", model="smollm2-small").status_code == ask("small").status_code == 200
    unknown = ask("small", model="gpt-17")
    assert unknown.status_code == 404
    assert "smollm2-large" not in unknown.text
    listed = httpx.get(f"{gateway.url}/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == ["auto", "smollm2-small"]
    assert httpx.get(f"{gateway.url}/v1/models/smollm2-large", headers=headers).status_code == 403


@pytest.mark.parametrize(("who", "status"), [("small", 403), ("reader", 200), ("team", 200)])
def test_the_embedder_is_a_model_among_others(gateway: Server, who: str, status: int) -> None:
    headers = {"Authorization": f"Bearer {KEYS[who]}"}
    body = {"model": "embedder", "input": "What is a gnu?"}
    assert httpx.post(f"{gateway.url}/v1/embeddings", json=body, headers=headers).status_code == status


def test_requests_per_minute_over_http(ask: Ask, gateway: Server) -> None:
    first, second, third = (ask("few") for _ in range(3))
    assert [response.status_code for response in (first, second, third)] == [200, 200, 429]
    assert [response.headers["x-ratelimit-remaining-requests"] for response in (first, second)] == ["1", "0"]
    error = third.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(third.headers["retry-after"]) <= 30
    assert third.headers["x-ratelimit-limit-requests"] == "2"
    listed = httpx.get(f"{gateway.url}/v1/models", headers={"x-api-key": KEYS["few"]})
    assert listed.status_code == 200  # looking is free
    assert metric(gateway, 'fingerpost_tenant_requests_total{outcome="rate_limit_exceeded",tenant="few"}') == 1


def test_requests_at_once_over_http(ask: Ask, gateway: Server, stub: Server) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": "endless"})
    body = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": "Talk."}]}
    headers = {"Authorization": f"Bearer {KEYS['slow']}"}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as running:
        pieces = running.iter_raw()
        next(pieces)
        refused = ask("slow", "What else?")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert "at once" in refused.json()["error"]["message"]
    httpx.post(f"{stub.url}/stub", json={"fault": "none"})
    wait_until("the place to be free", lambda: ask("slow", "What else?").status_code == 200, 5)


def test_tokens_per_minute_over_http(ask: Ask, gateway: Server) -> None:
    def spent() -> float:
        return metric(gateway, 'fingerpost_tenant_tokens_total{tenant="metered"}')

    whole = ask("metered", "How many tokens?")
    assert (
        int(whole.headers["x-ratelimit-remaining-tokens"]) == 993
    )  # those of the prompt are reserved, and of what is around it
    wait_until("the answer's usage", lambda: spent() == 31)
    n_two = ask("metered", "How many in a stream that is not stored?", stream=True, n=2)
    assert not any(event.get("usage") for event in events(n_two))  # which only the gateway has asked for
    wait_until("the stream's usage", lambda: spent() == 62)
    assert ask("metered", "How many tokens?").headers["x-fingerpost-cache"] == "hit-exact"
    assert ask("metered", model="gpt-17").status_code == 404
    assert spent() == 62
    tools = [{"type": "function", "function": {"name": "f", "description": "word " * 1000}}]
    for long in (ask("metered", "word " * 1000), ask("metered", "Hi", tools=tools)):
        assert (long.status_code, long.headers["x-should-retry"]) == (429, "false")
        assert long.json()["error"]["type"] == "tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_an_answer_to_others_pays_for_all_of_it(gateway: Server, stub: Server, stream: bool) -> None:
    """Before the first byte, as of what is not streamed, or after it."""

    def spent() -> float:
        return metric(gateway, 'fingerpost_tenant_tokens_total{tenant="leaver"}')

    messages = [{"role": "user", "content": f"Which answer is left? {stream}"}]
    asked: Tree = {
        "json": {"model": "auto", "messages": messages, "stream": stream},
        "headers": {"Authorization": f"Bearer {KEYS['leaver']}"},
    }

    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as client:
            first = asyncio.ensure_future(client.post("/v1/chat/completions", **asked))
            await asyncio.sleep(0.15)
            second = asyncio.ensure_future(client.post("/v1/chat/completions", **asked))
            await asyncio.sleep(0.1)
            first.cancel()
            return await second

    before = spent()
    httpx.post(f"{stub.url}/stub", json={"fault": "slow"}).raise_for_status()
    try:
        assert asyncio.run(scenario()).headers["x-fingerpost-cache"] == "joined"
    finally:
        httpx.post(f"{stub.url}/stub", json={"fault": "none"}).raise_for_status()
    wait_until("the answer to be charged", lambda: spent() == before + 31, 5)


def test_the_official_client_understands(gateway: Server) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="fp-wrong").chat.completions.create(
            model="auto", messages=messages
        )
    with pytest.raises(openai.PermissionDeniedError):
        client(gateway, "small").chat.completions.create(model="smollm2-large", messages=messages)
    with pytest.raises(openai.RateLimitError):
        client(gateway, "metered").chat.completions.create(
            model="auto", messages=[{"role": "user", "content": "word " * 1000}]
        )
    assert client(gateway, "team").chat.completions.create(model="auto", messages=messages).choices


# What a configuration of tenants may be


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tenants": [{"name": "a"}]}, "tenants[0].key_sha256: missing key"),
        ({"tenants": [{"name": "a", "key_sha256": []}]}, "tenants[0].key_sha256: "),
        ({"tenants": [{"name": "a", "key_sha256": ["fp-the-key"]}]}, "tenants[0].key_sha256[0]: must be the 64 hex"),
        ({"tenants": [{"name": "a", "key_sha256": [digest("")]}]}, "is the digest of an empty key"),
        ({"tenants": [TENANTS[0], TENANTS[0]]}, "tenants[1].name: is given twice"),
        ({"tenants": [TENANTS[1], {**TENANTS[1], "name": "b"}]}, "tenants[1].key_sha256[0]: is given twice"),
        ({"tenants": [{**TENANTS[1], "models": []}]}, "tenants[0].models: "),
        ({"tenants": [{**TENANTS[1], "models": ["huge"]}]}, "tenants[0].models[0]: unknown model (known: auto, "),
        ({"tenants": [{**TENANTS[1], "requests_per_minute": 0}]}, "tenants[0].requests_per_minute: "),
        ({"tenants": TENANTS, "listen": {"allow_anonymous": True}}, "listen.allow_anonymous: cannot stand beside"),
        ({"tenants": TENANTS[1:2], "listen": {"admin_key_sha256": digest(KEYS["other"])}}, "is given twice"),
        ({"listen": {"admin_key_sha256": "fp-the-key"}}, "listen.admin_key_sha256: must be the 64 hex"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tenants_that_cannot_be(tmp_path: Path, changes: Tree, problem: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(merged(shipped(), changes)))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "config.yaml")
    assert problem in str(caught.value)
    assert "fp-the-key" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "gateway.example"])  # noqa: S104
def test_a_gateway_that_others_reach_needs_tenants(tmp_path: Path, host: str) -> None:
    path = tmp_path / "config.yaml"
    for listen, tenants in (({"host": host, "allow_anonymous": True}, []), ({"host": host}, TENANTS)):
        path.write_text(yaml.safe_dump({**shipped(), "listen": listen, "tenants": tenants}))
        assert load(path).listen.host == host
    path.write_text(yaml.safe_dump({**shipped(), "listen": {"host": host}}))
    with pytest.raises(ConfigError, match=r"listen\.allow_anonymous: true"):
        load(path)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_a_gateway_that_nobody_else_reaches_needs_none(tmp_path: Path, host: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**shipped(), "listen": {"host": host}}))
    assert load(tmp_path / "config.yaml").tenants == ()


def test_the_gateway_refuses_to_start_where_anybody_could_use_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**shipped(), "listen": {"host": "::"}}))
    command = [sys.executable, "-m", "gateway", "--config", str(tmp_path / "config.yaml")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "listen.host: others reach it and there are no tenants" in ended.stderr
