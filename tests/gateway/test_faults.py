"""What happens when a part dies: real Triton and Milvus processes, killed and started again under a running gateway."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, Part, Server, Stack, StartGateway, chat, content, models, wait_until


def outcome(gateway: Server, question: str, **fields: Any) -> str:
    return str(chat(gateway.url, question, **fields).headers["x-fingerpost-cache"])


def not_ready(gateway: Server) -> set[str]:
    return set(httpx.get(f"{gateway.url}/ready", timeout=10).json()["not_ready"])


def test_triton_dies_and_comes_back(
    killable_triton: tuple[Part, str], stub: Server, start_gateway: StartGateway
) -> None:
    part, address = killable_triton
    gateway = start_gateway(
        {
            "triton": {"address": address},
            "models": models(stub.url),
            "semantic_cache": {"backend_type": "memory"},
        }
    )
    assert outcome(gateway, "What is a gnu?") == "miss"
    part.kill()
    assert outcome(gateway, "What is a gnu?") == "hit-exact"
    lost = chat(gateway.url, "What is an okapi?")
    assert lost.status_code == 200
    assert (lost.headers["x-fingerpost-rule"], lost.headers["x-fingerpost-cache"]) == ("default", "bypass")
    assert "x-fingerpost-category" not in lost.headers
    assert chat(gateway.url, "Explain it step by step.").headers["x-fingerpost-rule"] == "asked-to-think"
    started = time.monotonic()
    assert all(chat(gateway.url, f"Question {i}?").status_code == 200 for i in range(20))
    assert time.monotonic() - started < 10, "requests wait for a Triton that is down"
    assert not_ready(gateway) == {"triton"}
    assert 'degradations_total{part="triton"}' in httpx.get(f"{gateway.url}/metrics").text
    part.start()
    wait_until("the gateway to find Triton again", lambda: "x-fingerpost-category" in chat(gateway.url).headers, 10)
    assert not_ready(gateway) == set()


def test_milvus_dies_and_comes_back(
    stack: Stack, killable_milvus: tuple[Part, int], stub: Server, start_gateway: StartGateway
) -> None:
    part, port = killable_milvus
    changes = {"triton": stack.config_tree["triton"], "models": models(stub.url)}
    connection = {"connection": {"port": port}}
    gateway = start_gateway(changes, connection)
    wait_until("the cache to open", lambda: not_ready(gateway) == set(), 60)
    kept = chat(gateway.url, "How many legs has a spider?")
    time.sleep(1)  # for the write, which is off the request path
    part.kill()
    started = time.monotonic()
    assert [outcome(gateway, f"Name {i} rivers of Asia.", tenant=f"t{i}") for i in range(10)] == ["miss"] * 10
    assert time.monotonic() - started < 5, "requests wait for a Milvus that is down"
    assert not_ready(gateway) == {"cache"}
    newcomer = start_gateway(changes, connection)  # a gateway starts without Milvus, too
    assert outcome(newcomer, "How many legs has an ant?") == "miss"
    part.start()
    wait_until("both gateways to open the cache", lambda: not_ready(gateway) | not_ready(newcomer) == set(), 60)
    late = start_gateway(changes, connection)
    wait_until("a third one to open it", lambda: not_ready(late) == set(), 60)
    wait_until("the stored answer", lambda: outcome(late, "How many legs has a spider?") == "hit-exact", 20)
    assert content(kept) == content(chat(late.url, "How many legs has a spider?"))


def test_a_gateway_starts_with_everything_down(start_gateway: StartGateway) -> None:
    dead = {"address": "127.0.0.1:9"}
    gateway = start_gateway({"triton": dead, "models": models("http://127.0.0.1:9")}, {"connection": {"port": 9}})
    assert not_ready(gateway) == {"triton", "cache", "smollm2-small", "smollm2-large"}
    assert chat(gateway.url).status_code == 503
    assert httpx.get(f"{gateway.url}/health").status_code == 200


def test_weights_that_are_not_the_manifest_s_are_not_used(
    stack: Stack, stub: Server, start_gateway: StartGateway, tmp_path: Path
) -> None:
    for model in ("embedder", "classifier", "verifier"):
        manifest = json.loads((ROOT / f"model_repository/{model}/weights/manifest.json").read_text())
        other = tmp_path / f"{model}/weights/manifest.json"
        other.parent.mkdir(parents=True)
        other.write_text(json.dumps({**manifest, "fingerprint": "0123456789abcdef"}))
    gateway = start_gateway(
        {
            "triton": {**stack.config_tree["triton"], "model_repository": str(tmp_path)},
            "models": models(stub.url),
            "semantic_cache": {"backend_type": "memory"},
        }
    )
    response = chat(gateway.url)
    assert response.status_code == 200
    assert "x-fingerpost-category" not in response.headers
    assert "restart both" in gateway.log.read_text()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  port: 8801", "  port: 8801\n  colour: red", "listen.colour: unknown key (got 'red')"),
        ("category: [math,", "category: [maths,", "unknown category"),
        ("default: smollm2-small", "default: smollm3", "policy.default: unknown model"),
        ("model_repository: model_repository", "model_repository: nowhere", "nowhere/embedder/weights/manifest.json"),
    ],
    ids=["key", "category", "model", "weights"],
)
def test_a_wrong_configuration_stops_the_start(stack: Stack, tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = (ROOT / "config/config.yaml").read_text()
    assert old in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(old, new))
    command = [sys.executable, "-m", "gateway", "--config", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert expected in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
