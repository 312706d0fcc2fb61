"""The HTTP surface, over a real Triton and a stub vLLM that can be told to fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, Server, Stack, StartGateway, chat, content, events, models, wait_until

Ask = Callable[..., httpx.Response]

QUESTION = "What are the main renewable energy sources?"
PARAPHRASE = "Which are the most important sources of renewable energy?"


@pytest.fixture(scope="module")
def gateway(stack: Stack, stub: Server, start_gateway: StartGateway) -> Server:
    """Real Triton, cache in memory, both models at the stub."""
    return start_gateway(
        {
            "listen": {"max_body_bytes": 200_000},
            "triton": stack.config_tree["triton"],
            "models": models(stub.url),
            "semantic_cache": {"backend_type": "memory"},
        }
    )


@pytest.fixture
def ask(request: pytest.FixtureRequest, gateway: Server) -> Ask:
    """Asks `gateway` as a tenant of the test's own, so that no test hits what another stored."""
    return partial(chat, gateway.url, tenant=request.node.name.encode().hex())


@pytest.fixture(autouse=True)
def healthy_stub(stub: Server) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": "none"})


def fail(stub: Server, fault: str) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": fault}).raise_for_status()


def received(stub: Server) -> list[dict[str, Any]]:
    return list(httpx.get(f"{stub.url}/stub").json()["received"])


def test_a_miss_an_exact_hit_and_a_paraphrase(ask: Ask, stub: Server) -> None:
    before = len(received(stub))
    miss, exact, semantic = ask(QUESTION), ask(QUESTION), ask(PARAPHRASE)
    outcomes = [response.headers["x-fingerpost-cache"] for response in (miss, exact, semantic)]
    assert outcomes == ["miss", "hit-exact", "hit-semantic"]
    assert content(miss) == content(exact) == content(semantic)
    assert len(received(stub)) == before + 1
    assert 0.90 < float(semantic.headers["x-fingerpost-similarity"]) < 0.92
    assert "x-fingerpost-similarity" not in exact.headers
    for name in ("model", "category", "complexity", "rule"):
        assert exact.headers[f"x-fingerpost-{name}"] == miss.headers[f"x-fingerpost-{name}"]
    assert exact.json()["usage"] == miss.json()["usage"]
    assert exact.headers["x-request-id"] != miss.headers["x-request-id"]


@pytest.mark.parametrize("first", [False, True], ids=["json-first", "stream-first"])
@pytest.mark.parametrize("second", [False, True], ids=["json-second", "stream-second"])
def test_every_form_has_the_same_content(ask: Ask, first: bool, second: bool) -> None:
    question = f"Write a limerick about {'a whale' if first else 'a clock'} {'at sea' if second else 'on a tower'}."
    one, two = ask(question, stream=first), ask(question, stream=second)
    assert one.headers["x-fingerpost-cache"] == "miss"
    assert two.headers["x-fingerpost-cache"] == "hit-exact"
    assert content(one) == content(two) != ""
    assert two.headers["content-type"].startswith("text/event-stream") is second


def test_usage_is_streamed_only_when_asked_for(ask: Ask) -> None:
    question = "How do I sharpen a kitchen knife?"
    wanted = {"stream": True, "stream_options": {"include_usage": True}}
    for outcome in ("miss", "hit-exact"):
        silent, told = ask(question, stream=True), ask(question + " ", **wanted)
        assert silent.headers["x-fingerpost-cache"] == outcome
        assert not any(event.get("usage") for event in events(silent))
        assert [event["usage"]["total_tokens"] for event in events(told) if not event["choices"]] == [31]
    assert ask(question).json()["usage"]["total_tokens"] == 31


def test_what_the_client_sends_reaches_vllm(ask: Ask, stub: Server) -> None:
    fields = {
        "temperature": 0.3,
        "top_p": 0.9,
        "stop": ["\n\n"],
        "seed": 7,
        "tools": [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}],
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"enable_thinking": False},
        "vendor_field": {"nested": [1, 2.5, None, "ä"]},
    }
    ask("Tell me about fields.", **fields)
    body = received(stub)[-1]["body"]
    assert body.pop("model") in {"smollm2-small", "smollm2-large"}
    assert body == {"messages": [{"role": "user", "content": "Tell me about fields."}], **fields}


def test_the_client_s_credentials_stay_here_and_the_model_s_are_sent(
    stack: Stack, stub: Server, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(
        {
            "triton": stack.config_tree["triton"],
            "models": [{**model, "api_key": "${TEST_UPSTREAM_KEY}"} for model in models(stub.url)],
            "semantic_cache": {"backend_type": "memory"},
        },
        env={"TEST_UPSTREAM_KEY": "upstream-secret"},
    )
    response = chat(gateway.url, headers={"Cookie": "a=b", "X-Request-Id": "mine-1"})
    headers = received(stub)[-1]["headers"]
    assert headers["authorization"] == "Bearer upstream-secret"
    assert headers["x-request-id"] == response.headers["x-request-id"] == "mine-1"
    assert "cookie" not in headers
    log = gateway.log.read_text()
    assert "upstream-secret" not in log
    assert "test-token" not in log


@pytest.mark.parametrize(
    "difference",
    [
        {"headers": {"Authorization": "Bearer somebody-else"}},
        {"model": "smollm2-small"},
        {"temperature": 0.1},
        {"max_tokens": 5},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."}]},
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Name a river."},
            ]
        },
    ],
    ids=["tenant", "model", "temperature", "max_tokens", "tools", "response_format", "system", "conversation"],
)
def test_another_scope_never_shares_an_answer(ask: Ask, difference: dict[str, Any]) -> None:
    ask("Name a river.")
    assert ask("Name a river.").headers["x-fingerpost-cache"] == "hit-exact"
    other = ask("Name a river.", **difference)
    assert other.headers["x-fingerpost-cache"] == "miss"


def test_cache_control(ask: Ask, stub: Server) -> None:
    question = "Who wrote the Kalevala?"

    def outcome(control: str) -> str:
        headers = {"x-fingerpost-cache-control": control} if control else {}
        return str(ask(question, headers=headers).headers["x-fingerpost-cache"])

    assert outcome("no-store") == "miss"
    assert outcome("no-store") == "miss"
    assert outcome("") == "miss"
    assert outcome("no-store") == "hit-exact"
    old = content(ask(question))
    assert outcome("no-cache") == "bypass"
    assert content(ask(question)) != old  # no-cache has stored the new answer
    assert outcome("no-cache, no-store") == "bypass"
    wrong = ask(question, headers={"x-fingerpost-cache-control": "only-if-cached"})
    assert wrong.status_code == 400
    assert "only-if-cached" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2}, "n is not 1"),
        ({"temperature": 1.5}, "temperature"),
        ({"logprobs": True}, "log probabilities"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]}, "last message"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is this?"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                        ],
                    }
                ]
            },
            "not text alone",
        ),
        ({"messages": [{"role": "user", "content": "long " * 3000}]}, "longer than"),
    ],
    ids=["n", "temperature", "logprobs", "prefix", "image", "truncated"],
)
def test_what_may_not_be_cached_is_not(
    gateway: Server, ask: Ask, stub: Server, fields: dict[str, Any], reason: str
) -> None:
    for _ in range(2):
        response = ask("Tell me something.", **fields)
        assert response.headers["x-fingerpost-cache"] == "bypass"
        assert reason in response.headers["x-fingerpost-cache-reason"]
    body = {"model": "auto", "messages": [{"role": "user", "content": "Tell me something."}], **fields}
    described = httpx.post(f"{gateway.url}/v1/route", json=body).json()
    assert described["cache"]["eligible"] is False
    assert reason in described["cache"]["reason"]


IN_BOTH_FORMS = ["length", "break", "status-500", "status-400"]
NOT_WHOLE = [(fault, stream) for fault in IN_BOTH_FORMS for stream in (False, True)]
NOT_WHOLE += [("tool-call", False), ("no-done", True), ("error-event", True)]


@pytest.mark.parametrize(("fault", "stream"), NOT_WHOLE)
def test_an_answer_that_is_not_whole_is_never_stored(ask: Ask, stub: Server, fault: str, stream: bool) -> None:
    question = f"Explain the word {fault} {'slowly' if stream else 'quickly'}."
    fail(stub, fault)
    try:
        failed = ask(question, stream=stream)
        if fault.startswith("status-"):
            assert failed.status_code == int(fault.removeprefix("status-"))
            assert failed.json()["error"]["message"] == "stub says no"
        if fault == "break":
            assert failed.status_code == 503
            assert failed.json()["error"]["code"] == "upstream_unavailable"
    except httpx.RemoteProtocolError:
        assert (fault, stream) == ("break", True)
    fail(stub, "none")
    after = ask(question)
    assert after.headers["x-fingerpost-cache"] == "miss"
    assert content(after) == content(ask(question))


def test_a_stream_in_single_bytes_arrives_unchanged(ask: Ask, stub: Server) -> None:
    fail(stub, "bytes")
    pieces = ask("Which byte is first?", stream=True)
    fail(stub, "none")
    whole = ask("Which byte is first?")
    assert whole.headers["x-fingerpost-cache"] == "hit-exact"
    assert content(pieces) == content(whole)
    assert content(whole).endswith("naïve 😀")


def test_a_stream_is_passed_on_as_it_comes(gateway: Server, stub: Server) -> None:
    fail(stub, "slow")
    body = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": "Count slowly to ten."}]}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, timeout=30) as response:
        pieces = [piece for piece in response.iter_raw() if piece]
    assert len(pieces) > 5


def test_when_a_client_that_waits_for_json_leaves_vllm_is_told(gateway: Server, stub: Server) -> None:
    fail(stub, "slow")
    before = httpx.get(f"{stub.url}/stub").json()["abandoned"]
    body = {"model": "auto", "messages": [{"role": "user", "content": "Take your time."}]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=0.3)
    wait_until("vLLM to be told", lambda: httpx.get(f"{stub.url}/stub").json()["abandoned"] > before, 5)


def test_when_the_client_leaves_vllm_is_told(gateway: Server, ask: Ask, stub: Server) -> None:
    fail(stub, "endless")
    before = httpx.get(f"{stub.url}/stub").json()["abandoned"]
    body = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": "Never stop talking."}]}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, timeout=30) as response:
        next(response.iter_raw())
    wait_until("vLLM to be told", lambda: httpx.get(f"{stub.url}/stub").json()["abandoned"] > before, 5)
    fail(stub, "none")
    assert ask("Never stop talking.").headers["x-fingerpost-cache"] == "miss"


BAD_BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"\xff\xfe", None),
    (b"[1]", None),
    (b'"text"', None),
    (b"null", None),
    (b"{}", "model"),
    (b'{"model": 3}', "model"),
    (b'{"model": ""}', "model"),
    (b'{"model": "auto"}', "messages"),
    (b'{"model": "auto", "messages": {}}', "messages"),
    (b'{"model": "auto", "messages": []}', "messages"),
    (b'{"model": "auto", "messages": ["hi"]}', "messages[0]"),
    (b'{"model": "auto", "messages": [{"content": "hi"}]}', "messages[0].role"),
    (b'{"model": "auto", "messages": [{"role": 1, "content": "hi"}]}', "messages[0].role"),
    (b'{"model": "auto", "messages": [{"role": "user"}]}', "messages[0].content"),
    (b'{"model": "auto", "messages": [{"role": "user", "content": 5}]}', "messages[0].content"),
    (b'{"model": "auto", "messages": [{"role": "user", "content": [{"text": "x"}]}]}', "messages[0].content[0]"),
    (b'{"model": "auto", "stream": "yes", "messages": [{"role": "user", "content": "hi"}]}', "stream"),
    (b'{"model": "auto", "stream_options": 1, "messages": [{"role": "user", "content": "hi"}]}', "stream_options"),
    (b'{"model": "auto", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", None),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/route"])
@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=[str(body[:60]) for body, _ in BAD_BODIES])
def test_bad_bodies_get_a_clear_400(gateway: Server, path: str, body: bytes, param: str | None) -> None:
    response = httpx.post(gateway.url + path, content=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]


def test_other_client_errors(gateway: Server, ask: Ask) -> None:
    unknown = ask(model="gpt-17")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "smollm2-small" in unknown.json()["error"]["message"]
    large = httpx.post(f"{gateway.url}/v1/chat/completions", content=b"x" * 200_001)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    chunked = httpx.post(f"{gateway.url}/v1/chat/completions", content=iter([b"x" * 150_000] * 2))
    assert chunked.status_code == 413
    method = httpx.get(f"{gateway.url}/v1/chat/completions")
    assert (method.status_code, method.headers["allow"]) == (405, "POST")
    assert method.json()["error"]["type"] == "invalid_request_error"
    nowhere = httpx.get(f"{gateway.url}/v1/nothing")
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "invalid_request_error")


def test_models(gateway: Server) -> None:
    listed = httpx.get(f"{gateway.url}/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["auto", "smollm2-small", "smollm2-large"]
    assert httpx.get(f"{gateway.url}/v1/models/smollm2-small").json()["max_model_len"] == 2048
    assert httpx.get(f"{gateway.url}/v1/models/auto").status_code == 200
    assert httpx.get(f"{gateway.url}/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_route_decides_and_asks_nobody(gateway: Server, stub: Server) -> None:
    before = len(received(stub))
    body = {"model": "auto", "messages": [{"role": "user", "content": "Explain step by step how rain forms."}]}
    described = httpx.post(f"{gateway.url}/v1/route", json=body).json()
    assert len(received(stub)) == before
    assert (described["rule"], described["model"]) == ("asked-to-think", "smollm2-large")
    assert described["endpoint"] == stub.url
    assert described["cache"] == {"eligible": True, "reason": None}
    assert described["truncated"] is False
    assert 0 <= described["complexity"] <= 1
    assert len(described["category_scores"]) == 14
    assert sum(described["category_scores"].values()) == pytest.approx(1, abs=1e-4)
    likeliest = max(described["category_scores"], key=described["category_scores"].get)
    assert described["category"] in {likeliest, "other"}  # when it abstains
    assert described["quality"] == {}
    assert described["reason"] == "its rule holds (keyword 'step by step')"
    named = httpx.post(f"{gateway.url}/v1/route", json={**body, "model": "smollm2-small"}).json()
    assert (named["rule"], named["model"]) == ("named", "smollm2-small")


def test_the_cheapest_of_nearly_the_best_quality_answers(
    stack: Stack, stub: Server, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """Abilities are in the manifest only, so both models can have one here, though Triton runs with the shipped one."""
    for part in ("embedder", "classifier", "verifier"):
        (tmp_path / part / "weights").mkdir(parents=True)
        manifest = json.loads((ROOT / f"model_repository/{part}/weights/manifest.json").read_text())
        if part == "classifier":
            flat = [0.0] * manifest["difficulty"]
            manifest["abilities"] = {
                "smollm2-small": {"weights": flat, "bias": 1.0},
                "better": {"weights": flat, "bias": 1.1},
            }
        (tmp_path / part / "weights/manifest.json").write_text(json.dumps(manifest))
    small, large = models(stub.url)

    def described(margin: float) -> Any:
        gateway = start_gateway(
            {
                "triton": {**stack.config_tree["triton"], "model_repository": str(tmp_path)},
                "models": [small, {**large, "ability": "better"}],
                "policy": {"rules": [{"name": "choice", "cheapest_within": margin}]},
                "semantic_cache": {"enabled": False},
            }
        )
        body = {"model": "auto", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
        assert chat(gateway.url).headers["x-fingerpost-rule"] == "choice"
        return httpx.post(f"{gateway.url}/v1/route", json=body).json()

    wide, narrow = described(0.05), described(0.01)
    assert wide["quality"] == pytest.approx({"smollm2-small": 0.7311, "smollm2-large": 0.7503}, abs=1e-4)
    assert (wide["model"], narrow["model"]) == ("smollm2-small", "smollm2-large")
    assert "within 0.05 of the best (smollm2-large, 0.750)" in wide["reason"]


def test_metrics_tell_what_happened_and_no_prompt(gateway: Server, ask: Ask) -> None:
    ask("A secret phrase: xylophone.")
    ask("A secret phrase: xylophone.")
    text = httpx.get(f"{gateway.url}/metrics").text
    for line in ('cache_outcomes_total{outcome="hit-exact"}', 'cache_outcomes_total{outcome="miss"}', "saved_cost"):
        assert line in text
    assert "xylophone" not in text
    assert "xylophone" not in gateway.log.read_text()


def test_an_endpoint_that_is_down_is_passed_over(stack: Stack, stub: Server, start_gateway: StartGateway) -> None:
    dead = "http://127.0.0.1:9"
    shared = {"triton": stack.config_tree["triton"], "semantic_cache": {"enabled": False}}
    gateway = start_gateway({**shared, "models": models(dead, stub.url)})
    assert [chat(gateway.url).status_code for _ in range(4)] == [200] * 4
    assert "endpoint_errors_total" in httpx.get(f"{gateway.url}/metrics").text
    none_left = start_gateway({**shared, "models": models(dead)})
    response = chat(none_left.url)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "upstream_unavailable")
    ready = httpx.get(f"{none_left.url}/ready")
    assert ready.status_code == 503
    assert set(ready.json()["not_ready"]) == {"smollm2-small", "smollm2-large"}


def test_health_and_ready(gateway: Server) -> None:
    assert httpx.get(f"{gateway.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{gateway.url}/ready").json() == {"status": "ready", "not_ready": {}}


def test_concurrent_requests_get_their_own_answers(ask: Ask) -> None:
    def own_answer(i: int) -> bool:
        question = f"What is {i} squared, and what rhymes with {i}?"
        response = ask(question, stream=bool(i % 2), headers={"Authorization": f"Bearer tenant-{i}"})
        return question in content(response)

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(own_answer, range(64)))


def test_json_from_vllm_is_passed_byte_for_byte(ask: Ask, stub: Server) -> None:
    response = ask("Bytes, please.", headers={"x-fingerpost-cache-control": "no-store"})
    assert response.content == json.dumps(response.json(), ensure_ascii=False).encode()


def test_a_silent_endpoint_is_given_up_and_not_asked_twice(
    stack: Stack, stub: Server, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(
        {
            "triton": stack.config_tree["triton"],
            "models": models(stub.url, stub.url.replace("127.0.0.1", "localhost")),
            "semantic_cache": {"enabled": False},
            "upstream": {"idle_timeout_seconds": 0.2, "timeout_retry_share": 0},
        }
    )
    fail(stub, "slow")
    before = len(received(stub))
    response = chat(gateway.url)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")
    assert len(received(stub)) == before + 1


def test_a_whole_answer_is_kept_though_the_client_leaves_at_its_end(gateway: Server, ask: Ask) -> None:
    body = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": "Leave me at the end."}]}
    headers = {"Authorization": ask().request.headers["authorization"]}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                break
    assert ask("Leave me at the end.").headers["x-fingerpost-cache"] == "hit-exact"
