"""Which servers a configuration has started on this machine, and what they are started with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.local.parts import Part, address, parts
from deploy.local.supervisor import last_words, obituary
from gateway.config import Config, load
from tests.conftest import ROOT, Tree, merged, models, shipped

LITE = {"connection": {"uri": "data/cache.db"}, "collection": {"index": {"type": "FLAT", "params": {}}}}
ELSEWHERE = {"connection": {"host": "milvus.example.com"}}


def config(folder: Path, changes: Tree, milvus: Tree) -> Config:
    (folder / "milvus.yaml").write_text(yaml.safe_dump(merged(shipped("cache/milvus.yaml"), milvus)))
    own = {"semantic_cache": {"backend_config_path": str(folder / "milvus.yaml")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(merged(shipped(), own), changes)))
    return load(folder / "config.yaml")


@pytest.mark.parametrize(
    ("changes", "milvus", "expected"),
    [
        ({}, {}, "triton milvus vllm gateway"),
        ({"models": models("http://10.0.0.7:8000")}, {}, "triton milvus gateway"),
        ({"models": models("http://127.0.0.1:8000")}, {}, "triton milvus gateway"),
        ({"models": models("http://10.0.0.7:8000", "http://localhost:8810")}, {}, "triton milvus vllm gateway"),
        ({"triton": {"address": "triton.example.com:8001"}}, {}, "milvus vllm gateway"),
        ({}, ELSEWHERE, "triton vllm gateway"),
        ({}, LITE, "triton vllm gateway"),
        ({"semantic_cache": {"backend_type": "memory"}}, {}, "triton vllm gateway"),
        ({"semantic_cache": {"enabled": False}}, {}, "triton vllm gateway"),
        ({"local": {}}, {}, "gateway"),
    ],
)
def test_what_is_started_here(tmp_path: Path, changes: Tree, milvus: Tree, expected: str) -> None:
    assert " ".join(part.name for part in parts(config(tmp_path, changes, milvus))) == expected


def test_what_is_started_here_as_make_asks(tmp_path: Path) -> None:
    written = config(tmp_path, {}, LITE)
    command = [sys.executable, "-m", "deploy.local.stack", "parts", "--config", str(written.source)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout == b"triton\nvllm\n"


def test_vllm_serves_the_models_that_are_expected_of_it(tmp_path: Path) -> None:
    small, large = models("http://127.0.0.1:8810")
    elsewhere = {**large, "name": "elsewhere", "endpoints": ["http://10.0.0.7:8810"]}
    written = config(tmp_path, {"models": [small, large, elsewhere]}, {})
    command = one("vllm", written).command
    names = command[command.index("--names") + 1 : command.index("--data")]
    assert names == (small["name"], large["name"])


def test_ports_come_from_the_configuration(tmp_path: Path) -> None:
    changes = {"triton": {"address": "localhost:7001"}, "local": {"triton": {"http_port": 7000, "metrics_port": 7002}}}
    written = config(tmp_path, changes, {"connection": {"port": 7003}})
    assert sorted(one("triton", written).ports.values()) == [7000, 7001, 7002]
    assert one("milvus", written).ports == {"connection.port": 7003, "local.milvus.metrics_port": 9091}


@pytest.mark.parametrize(
    ("host", "expected"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.7", "10.0.0.7")],  # noqa: S104
)
def test_a_client_s_address(tmp_path: Path, host: str, expected: str) -> None:
    written = config(tmp_path, {"listen": {"host": host, "allow_anonymous": True}}, {})
    assert address(written) == f"http://{expected}:8801"


@pytest.mark.parametrize(
    ("listen", "asked"),
    [
        ({}, "ready"),
        ({"host": "0.0.0.0", "allow_anonymous": False}, "ready"),  # noqa: S104
        ({"host": "10.0.0.7", "allow_anonymous": False}, "health"),  # which takes itself for another machine
        ({"host": "10.0.0.7"}, "ready"),
        ({"admin_key_sha256": "0" * 64}, "health"),
    ],
)
def test_the_gateway_is_asked_what_it_answers_without_a_key(tmp_path: Path, listen: Tree, asked: str) -> None:
    tenants = [{"name": "a", "key_sha256": ["1" * 64]}] if listen.get("allow_anonymous") is False else []
    written = config(tmp_path, {"listen": {"allow_anonymous": True, **listen}, "tenants": tenants}, {})
    assert one("gateway", written).ready == (f"{address(written)}/{asked}",)


def test_last_words_speak_of_the_trouble(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    log.write_text("starting\nRuntimeError: no such model\ncleaning up\n\n")
    assert last_words(log) == "RuntimeError: no such model"
    assert obituary("vllm", 1, log) == f"vllm ended with exit status 1; its log is {log}: RuntimeError: no such model"
    log.write_text("")
    assert last_words(log) == "(empty)"


def test_vllm_s_requirements_without_what_text_does_not_need() -> None:
    program = "from deploy.local.install_vllm import the_rest; print(*the_rest(), sep='\\n')"
    command = [str(ROOT / ".venv-vllm/bin/python"), "-c", program]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.splitlines()
    assert any(line.startswith("transformers") for line in lines)
    assert not [line for line in lines if line.startswith("torch") or ";" in line]


def one(name: str, written: Config) -> Part:
    [part] = [part for part in parts(written) if part.name == name]
    return part
