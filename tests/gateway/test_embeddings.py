"""Embeddings and classifications: the bodies that are taken, and the answers, from a Triton that is a stub."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from gateway.embeddings import embedding_list, parse_classify, parse_embeddings, tokens
from gateway.errors import ApiError, BadRequest
from gateway.triton import MAX_CHARACTERS, Embedded
from tests.conftest import Server, StartGateway, Tree, models, wait_until
from tests.stub_triton import DIMENSION, LABELS, embedding

# What is taken


def parsed(**fields: Any) -> Any:
    body = {"model": "embedder", "input": "Hello", **fields}
    return parse_embeddings(json.dumps(body).encode(), dimension=4, most=3)


def test_one_text_and_several() -> None:
    assert parsed().texts == ("Hello",)
    assert parsed(input=["Hello", "World"]).texts == ("Hello", "World")
    assert parsed(dimensions=4, encoding_format="base64", user="u").encoding == "base64"
    assert parsed(dimensions=None, encoding_format=None, user=None).encoding == "float"


BAD: list[tuple[Tree, str, str]] = [
    ({"input": None}, "input", "required"),
    ({"input": []}, "input", "non-empty"),
    ({"input": 3}, "input", "string"),
    ({"input": {}}, "input", "string"),
    ({"input": ""}, "input", "empty"),
    ({"input": "  "}, "input", "empty"),
    ({"input": ["a", ""]}, "input[1]", "empty"),
    ({"input": ["a", None]}, "input[1]", "not a string"),
    ({"input": [1, 2, 3]}, "input[0]", "tokens are not taken"),
    ({"input": [[1, 2], [3]]}, "input[0]", "tokens are not taken"),
    ({"input": ["a"] * 4}, "input", "at most 3"),
    ({"dimensions": 5}, "dimensions", "4 dimensions"),
    ({"dimensions": "4"}, "dimensions", "not a whole number"),
    ({"encoding_format": "hex"}, "encoding_format", "float or base64"),
    ({"model": None}, "model", "required"),
    ({"model": "text-embedding-3-small"}, "model", "known: embedder"),
    ({"user": 3}, "user", "not a string"),
    ({"truncate": True}, "truncate", "not a field"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=[str(fields) for fields, _, _ in BAD])
def test_what_is_not_taken_is_named(fields: Tree, param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as raised:
        parsed(**fields)
    assert raised.value.param == param
    assert raised.value.status == (404 if "known" in words else 400)


def test_a_classification_takes_texts_and_perhaps_a_model() -> None:
    assert parse_classify(b'{"input": ["a", "b"], "model": "any"}', most=2) == ("a", "b")
    for raw, param in ((b'{"input": ["a", "b", "c"]}', "input"), (b'{"input": "a", "top": 3}', "top"), (b"[]", None)):
        with pytest.raises(BadRequest) as raised:
            parse_classify(raw, most=2)
        assert raised.value.param == param


# The answer


def test_numbers_and_base64_are_the_same() -> None:
    vectors = [np.array([0.6, -0.8, 0.1, 1e-8], dtype=np.float32), np.array([1, 0, 0, 0], dtype=np.float32)]
    found = [Embedded(vector, False) for vector in vectors]
    floats = json.loads(embedding_list(parsed(input=["a", "b"]), found))
    coded = json.loads(embedding_list(parsed(input=["a", "b"], encoding_format="base64"), found))
    for i, vector in enumerate(vectors):
        assert np.array_equal(np.float32(floats["data"][i]["embedding"]), vector)
        assert np.array_equal(np.frombuffer(base64.b64decode(coded["data"][i]["embedding"]), dtype="<f4"), vector)
        assert floats["data"][i]["index"] == i
    CreateEmbeddingResponse.model_validate(floats, strict=True)


def test_a_text_that_was_not_read_to_its_end_has_no_embedding() -> None:
    vector = np.array([1, 0, 0, 0], dtype=np.float32)
    with pytest.raises(BadRequest) as raised:
        embedding_list(parsed(input=["a", "b"]), [Embedded(vector, False), Embedded(vector, True)])
    assert raised.value.param == "input[1]"
    with pytest.raises(BadRequest, match="longer than the embedder reads"):
        parsed(input=["a", "x" * (MAX_CHARACTERS + 1)])
    assert len(parsed(input="x" * MAX_CHARACTERS).texts) == 1


def test_tokens_are_estimated() -> None:
    assert tokens(["12345678", "é", ""]) == 2 + 1 + 1


# Over HTTP


@pytest.fixture(scope="module")
def gateway(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(
        {
            "triton": stub_triton,
            "models": models(stub.url),
            "policy": {"rules": [], "default": "smollm2-small"},
            "semantic_cache": {"enabled": False},
            "batch": {"max_inputs": 40},
        }
    )


def post(gateway: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{gateway.url}/v1/{path}", json=body, timeout=60)


def test_many_texts_come_back_in_order(gateway: Server) -> None:
    texts = [f"number {i} of many" for i in range(40)]
    answer = post(gateway, "embeddings", model="embedder", input=texts)
    assert answer.status_code == 200
    assert [each["index"] for each in answer.json()["data"]] == list(range(40))
    for text, each in zip(texts, answer.json()["data"], strict=True):
        assert np.allclose(each["embedding"], embedding(text))
    assert answer.json()["usage"] == {"prompt_tokens": tokens(texts), "total_tokens": tokens(texts)}
    assert answer.headers["x-request-id"]
    assert 'texts_total{route="/v1/embeddings"} 40.0' in httpx.get(f"{gateway.url}/metrics").text


def test_more_than_the_configured_number(gateway: Server) -> None:
    answer = post(gateway, "embeddings", model="embedder", input=["a"] * 41)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


def test_a_text_longer_than_the_embedder_reads(gateway: Server) -> None:
    for text in ("word " * 300, "x" * 40_000):
        answer = post(gateway, "embeddings", model="embedder", input=["short", text])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")


def test_with_openais_client(gateway: Server) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k") as client:
        coded = client.embeddings.create(model="embedder", input=["a river", "a lake"])  # it asks for base64
        plain = client.embeddings.create(model="embedder", input="a river", encoding_format="float")
        assert np.allclose(coded.data[0].embedding, plain.data[0].embedding)
        assert len(plain.data[0].embedding) == DIMENSION
        with pytest.raises(openai.BadRequestError, match="384 dimensions"):
            client.embeddings.create(model="embedder", input="a", dimensions=256)
        with pytest.raises(openai.BadRequestError, match="tokens are not taken"):
            client.embeddings.create(model="embedder", input=[1, 2, 3])
        with pytest.raises(openai.NotFoundError, match="embedder"):
            client.embeddings.create(model="text-embedding-3-large", input="a")


def test_classify(gateway: Server) -> None:
    texts = ["write code in C", "some math, please", "good morning", *["and one more"] * 10]
    answer = post(gateway, "classify", input=texts)
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert [each["category"] for each in data[:3]] == ["code", "math", "other"]
    assert [each["index"] for each in data] == list(range(13))
    assert all(list(each["category_scores"]) == LABELS for each in data)
    assert all(sum(each["category_scores"].values()) == pytest.approx(1) for each in data)
    assert all(0 <= each["complexity"] <= 1 for each in data)
    long = post(gateway, "classify", input="word " * 300).json()["data"]
    assert [each["truncated"] for each in data[:1] + long] == [False, True]
    assert post(gateway, "classify", input=[3]).json()["error"]["param"] == "input[0]"


@pytest.mark.parametrize("path", ["embeddings", "classify"])
def test_a_triton_that_fails_is_a_503(gateway: Server, start_gateway: StartGateway, stub: Server, path: str) -> None:
    body = {"input": "please break triton", **({"model": "embedder"} if path == "embeddings" else {})}
    answer = post(gateway, path, **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "part_unavailable")
    assert "127.0.0.1" not in answer.text
    assert post(gateway, path, **{**body, "input": "again"}).status_code == 200


@pytest.mark.parametrize("path", ["embeddings", "classify"])
def test_when_the_client_leaves_no_more_texts_are_read(gateway: Server, path: str) -> None:
    body = {"input": ["slow triton"] * 40, **({"model": "embedder"} if path == "embeddings" else {})}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{gateway.url}/v1/{path}", json=body, timeout=0.3)
    given_up = f'fingerpost_requests_total{{route="/v1/{path}",status="499"}} 1.0'
    wait_until("the request to be given up", lambda: given_up in httpx.get(f"{gateway.url}/metrics").text, 10)
