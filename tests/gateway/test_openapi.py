"""The OpenAPI document: every route is in it, and what it says of requests and answers is what the gateway does."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any

import httpx
import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from starlette.routing import Route

from gateway.admin import parse_selection
from gateway.app import create_app
from gateway.config import load
from gateway.contract import read as read_contract
from gateway.dialects import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from gateway.embeddings import parse_classify, parse_embeddings
from gateway.errors import ApiError
from gateway.feedback import parse as parse_feedback
from gateway.lasting import Lasting
from gateway.metrics import Metrics
from gateway.openapi import DOCUMENT, VERSION
from gateway.request import parse
from gateway.tally import Alone
from tests.conftest import ROOT, Server, StartGateway, Tree, before_stubs
from tests.stub_triton import DIMENSION, write_manifests

FUZZ = settings(database=None, deadline=None, derandomize=True, max_examples=300)


def validator(name: str) -> Draft202012Validator:
    """Of the schema of this name."""
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_document_is_one() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    for name in DOCUMENT["components"]["schemas"]:
        Draft202012Validator.check_schema(DOCUMENT["components"]["schemas"][name])
    for reference in references(DOCUMENT):
        node: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
    operations = [each["operationId"] for path in DOCUMENT["paths"].values() for each in path.values()]
    assert len(set(operations)) == len(operations)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


def test_every_route_is_described(tmp_path: Any) -> None:
    (tmp_path / "config.yaml").write_text(
        "models: [{name: small, endpoints: [http://127.0.0.1:9], context_window: 9, size: small,"
        " price_per_million_tokens: {input: 1, output: 1}}]\npolicy: {default: small}\n"
    )
    contract = read_contract(write_manifests(tmp_path / "models"))
    app = create_app(load(tmp_path / "config.yaml"), contract, Lasting(Metrics(), Alone()))
    routes = {
        (route.path.replace(":path", ""), method)
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == {(path, method.upper()) for path, item in DOCUMENT["paths"].items() for method in item}


# What is taken

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.sampled_from(["", " ", "Hi", "user", "assistant", "text", "input_text", "message", "function_call_output"])
)
KEYS = st.sampled_from(["role", "content", "type", "text", "output", "include_usage"])
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


def as_often(good: st.SearchStrategy[Any], other: st.SearchStrategy[Any] = JSON) -> st.SearchStrategy[Any]:
    """One or the other, each half the time; of `good | other`, a sum of many, `good` would seldom be drawn."""
    return st.booleans().flatmap(lambda is_good: good if is_good else other)


PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text", "image"]) | JSON}, optional={"text": JSON})
CONTENT = as_often(st.just("Hi"), st.lists(PART, max_size=2) | JSON)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]) | JSON, "content": CONTENT},
    optional={"type": st.sampled_from(["message", "function_call"]) | JSON},
)
GOOD_TURNS = st.lists(st.sampled_from([{"role": role, "content": "Hi"} for role in ("user", "assistant")]), max_size=2)
TURNS = as_often(st.just("Hi") | GOOD_TURNS, st.lists(TURN | JSON, max_size=3) | JSON)


def body(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Bodies with a good model, or any, and some of these fields."""
    return as_often(st.fixed_dictionaries({"model": as_often(st.just("auto"))}, optional=optional))


STREAMING = {"stream": as_often(st.booleans()), "stream_options": as_often(st.none())}
REQUESTS: dict[str, tuple[Callable[[bytes], object], st.SearchStrategy[Any]]] = {
    "ChatCompletionRequest": (lambda raw: parse(raw, CHAT.view), body(messages=TURNS, **STREAMING)),
    "CompletionRequest": (lambda raw: parse(raw, COMPLETIONS.view), body(prompt=JSON, prompt_embeds=JSON, **STREAMING)),
    "ResponseRequest": (lambda raw: parse(raw, RESPONSES.view), body(input=TURNS, instructions=JSON, **STREAMING)),
    "MessagesRequest": (lambda raw: parse(raw, MESSAGES.view), body(messages=TURNS, system=CONTENT, **STREAMING)),
    "EmbeddingRequest": (
        lambda raw: parse_embeddings(raw, dimension=DIMENSION, most=10),
        st.fixed_dictionaries(
            {"model": st.just("embedder") | JSON, "input": JSON},
            optional={
                "encoding_format": st.sampled_from(["float", "base64"]) | JSON,
                "dimensions": st.just(DIMENSION),
                "user": JSON,
                "other": JSON,
            },
        ),
    ),
    "ClassifyRequest": (
        lambda raw: parse_classify(raw, most=10),
        st.fixed_dictionaries({"input": JSON}, optional={"model": JSON, "other": JSON}),
    ),
    "FeedbackRequest": (
        parse_feedback,
        st.fixed_dictionaries(
            {}, optional={"id": as_often(st.just("1")), "good": as_often(st.booleans()), "comment": JSON, "other": JSON}
        ),
    ),
    "CacheSelection": (
        parse_selection,
        st.fixed_dictionaries({}, optional={"tenant": as_often(st.just("a")), "model": JSON, "scope": JSON})
        | st.fixed_dictionaries({"tenant": JSON, "other": JSON}),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
@FUZZ
@given(data=st.data())
def test_a_schema_takes_what_the_gateway_takes(name: str, data: st.DataObject) -> None:
    taken_by, bodies = REQUESTS[name]
    value = data.draw(bodies)
    try:
        taken_by(json.dumps(value).encode())
        problem = ""
    except ApiError as error:
        problem = error.message
    described = next(validator(name).iter_errors(value), None)
    assert (described is None) == (problem == ""), problem or described


@pytest.mark.parametrize("name", REQUESTS)
def test_the_strategies_make_bodies_that_are_taken(name: str) -> None:
    taken_by, bodies = REQUESTS[name]

    def is_taken(value: Any) -> bool:
        try:
            taken_by(json.dumps(value).encode())
        except ApiError:
            return False
        return True

    hypothesis.find(bodies, is_taken, settings=settings(FUZZ, max_examples=2000))  # raises when it finds none


# What is answered


@pytest.fixture(scope="module")
def gateway(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(before_stubs(stub.url, stub_triton))


HELLO: list[Tree] = [{"role": "user", "content": "Hello"}]
GOOD: dict[str, Tree] = {
    "/v1/chat/completions": {"model": "auto", "messages": HELLO},
    "/v1/completions": {"model": "auto", "prompt": "Hello"},
    "/v1/responses": {"model": "auto", "input": "Hello"},
    "/v1/messages": {"model": "auto", "max_tokens": 9, "messages": HELLO},
    "/v1/route": {"model": "auto", "messages": HELLO},
    "/v1/embeddings": {"model": "embedder", "input": ["Hello", "World"]},
    "/v1/classify": {"input": "Hello"},
}


def check(path: str, method: str, response: httpx.Response) -> None:
    """The answer is one that the document tells of."""
    described = DOCUMENT["paths"][path][method]["responses"][str(response.status_code)]
    kind = response.headers["content-type"].split(";")[0]
    content = described["content"][kind]
    if kind == "application/json":
        Draft202012Validator({**content["schema"], "components": DOCUMENT["components"]}).validate(response.json())
    for name, header in described.get("headers", {}).items():
        if name in response.headers:
            Draft202012Validator(header["schema"]).validate(response.headers[name])


@pytest.mark.parametrize("path", GOOD)
def test_answers_are_as_described(gateway: Server, path: str) -> None:
    for _ in range(2):  # a miss and a hit
        answer = httpx.post(gateway.url + path, json=GOOD[path])
        assert answer.status_code == 200
        check(path, "post", answer)
    if "model" in GOOD[path] and path not in ("/v1/route", "/v1/embeddings"):
        check(path, "post", httpx.post(gateway.url + path, json={**GOOD[path], "stream": True}))


@pytest.mark.parametrize("path", [*GOOD, "/v1/feedback"])
def test_refusals_are_as_described(gateway: Server, path: str) -> None:
    for content, status in ((b"{", 400), (b"{}", 400), (b" " * 5_000_000, 413)):
        answer = httpx.post(gateway.url + path, content=content)
        assert answer.status_code == status
        check(path, "post", answer)
    wrong = {"id": "x", "good": True} if path == "/v1/feedback" else {**GOOD[path], "model": "gpt-17"}
    if path != "/v1/classify":
        answer = httpx.post(gateway.url + path, json=wrong)
        assert answer.status_code == 404
        check(path, "post", answer)


def test_feedback_is_as_described(gateway: Server) -> None:
    given_id = httpx.post(gateway.url + "/v1/chat/completions", json=GOOD["/v1/chat/completions"]).json()["id"]
    answer = httpx.post(f"{gateway.url}/v1/feedback", json={"id": given_id, "good": True})
    assert answer.status_code == 200
    check("/v1/feedback", "post", answer)


GOT = [path for path, item in DOCUMENT["paths"].items() if "get" in item and not path.startswith("/admin/")]


@pytest.mark.parametrize("path", GOT)
def test_what_is_got_is_as_described(gateway: Server, path: str) -> None:
    answer = httpx.get(gateway.url + path.replace("{name}", "smollm2-small"))
    assert answer.status_code == 200
    check(path, "get", answer)
    if "{name}" in path:
        check(path, "get", httpx.get(gateway.url + path.replace("{name}", "nobody")))


def test_the_document_is_served(gateway: Server) -> None:
    assert httpx.get(f"{gateway.url}/openapi.json").json() == json.loads(json.dumps(DOCUMENT))
