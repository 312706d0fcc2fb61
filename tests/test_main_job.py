"""The main job as a newcomer runs it: `make serve`, then the reference article's two requests, all parts real."""

from __future__ import annotations

import os
import re
import subprocess
import time
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import ROOT, Stack, chat, content, wait_until

QUESTION = "What are the main renewable energy sources?"
PARAPHRASE = "Which are the most important sources of renewable energy?"
ARTICLE: dict[str, Any] = {
    "model": "auto",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": QUESTION},
    ],
    "temperature": 0.7,
}


@pytest.fixture(scope="module")
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="test-token", max_retries=0)


def ask(stack: Stack, question: str = QUESTION) -> tuple[httpx.Response, float]:
    """The article's request and the seconds the client waited."""
    body = {**ARTICLE, "messages": [ARTICLE["messages"][0], {"role": "user", "content": question}]}
    with httpx.Client(timeout=300) as connection:
        connection.get(f"{stack.url}/health")  # the article's figures leave out connecting, too
        started = time.perf_counter()
        headers = {"Authorization": "Bearer test-token"}
        response = connection.post(f"{stack.url}/v1/chat/completions", json=body, headers=headers)
        return response, time.perf_counter() - started


def test_the_article_s_two_requests_and_a_paraphrase(stack: Stack) -> None:
    first, generating = ask(stack)
    assert first.headers["x-fingerpost-cache"] == "miss"
    assert "energy" in content(first).lower()
    assert first.json()["usage"]["completion_tokens"] > 5
    repeats = [ask(stack) for _ in range(5)]
    assert {response.headers["x-fingerpost-cache"] for response, _ in repeats} == {"hit-exact"}
    assert {content(response) for response, _ in repeats} == {content(first)}
    assert sorted(seconds for _, seconds in repeats)[2] < 0.05, f"generating took {generating:.2f} s"
    paraphrase, seconds = ask(stack, PARAPHRASE)
    assert paraphrase.headers["x-fingerpost-cache"] == "hit-semantic"
    assert content(paraphrase) == content(first)
    assert seconds < generating


def test_openai_client_chats_streams_and_lists(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "auto"
    assert client.models.retrieve(names[1]).id == names[1]
    messages: Any = [{"role": "user", "content": "Say hello to the sea."}]
    whole = client.chat.completions.create(model="auto", messages=messages, max_tokens=24, seed=1)
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.total_tokens > 0
    stream = client.chat.completions.create(
        model=names[1], messages=messages, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize("first", [False, True], ids=["json-first", "stream-first"])
def test_real_answers_are_the_same_in_every_form(stack: Stack, first: bool) -> None:
    question = f"Answer with one short sentence: what colour is {'grass' if first else 'the sky at noon'}?"
    one = chat(stack.url, question, stream=first, temperature=0)
    assert one.headers["x-fingerpost-cache"] == "miss"
    replays = [chat(stack.url, question, stream=stream, temperature=0) for stream in (False, True)]
    assert {replay.headers["x-fingerpost-cache"] for replay in replays} == {"hit-exact"}
    assert {content(replay) for replay in replays} == {content(one)}


def test_errors_are_the_client_s_own_kind(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-17", messages=messages)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="auto", messages=[])
    with pytest.raises(openai.BadRequestError):  # vLLM's own refusal, passed on
        client.chat.completions.create(model="auto", messages=messages, temperature=-3)


def test_the_readme_s_quick_start_as_written(stack: Stack) -> None:
    """`make serve` is how the stack was started; here the README's curl is run twice, only the port is another."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "make serve " in blocks[0]
    assert "make test " in blocks[0]
    command = blocks[1].replace("http://localhost:8801", stack.url)
    assert command != blocks[1]
    answers = [
        subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, check=True, env=os.environ)
        for _ in range(2)
    ]
    assert "HTTP/1.1 200" in answers[0].stdout
    assert "x-fingerpost-cache: hit-exact" in answers[1].stdout


def test_serve_says_what_it_starts_and_how_to_ask(stack: Stack) -> None:
    wait_until("the curl line", lambda: "curl" in stack.log.read_text())
    log = stack.log.read_text()
    for part in ("triton", "milvus", "vllm", "gateway"):
        assert part in log
    assert stack.url in log or f"localhost:{stack.ports['gateway']}" in log


def test_no_prompt_is_in_any_log(stack: Stack) -> None:
    chat(stack.url, "Whisper the word quokkamole to me.", max_tokens=4)
    logs = [path for path in stack.config.parent.rglob("*") if path.is_file() and path.suffix in (".log", ".txt")]
    assert len(logs) >= 4
    assert [path for path in logs if b"quokkamole" in path.read_bytes()] == []
