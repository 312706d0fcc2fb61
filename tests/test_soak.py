"""`python -m bench.soak`: what it takes for growth. The load itself takes half an hour and the real servers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import soak
from bench.soak import ALLOWED, Look, growth
from gateway.config import load
from gateway.metrics import Metrics
from tests.conftest import ROOT


def look(**held: Any) -> Look:
    return Look(**{"minute": 1.0, "requests": 1, "memory_mb": 100.0, "tasks": 9, "sockets": 12, **held})


def test_what_stays_or_swings_is_no_growth() -> None:
    filling = [look(memory_mb=80 + 4 * i) for i in range(5)]
    steady = [look(memory_mb=100 + i % 3, sockets=12 + i % 4) for i in range(10)]
    assert list(growth([*filling, *steady])) == []
    assert list(growth([look() for _ in range(6)])) == []


@pytest.mark.parametrize("name", ALLOWED)
def test_what_grows_without_end_is_told(name: str) -> None:
    looks = [look(**{name: 100 + ALLOWED[name] * i / 4}) for i in range(30)]
    [told] = growth(looks)
    assert told.startswith(f"{name} grew from ")


def test_a_single_peak_is_no_growth() -> None:
    assert list(growth([*(look() for _ in range(11)), look(memory_mb=500.0)])) == []


def test_sockets_are_counted() -> None:
    before = soak.sockets(os.getpid())
    with socket.socket():
        assert soak.sockets(os.getpid()) == before + 1


def test_the_gateway_tells_its_tasks() -> None:
    metrics = Metrics()
    metrics.tasks.set(7)
    found = soak._TASKS.search(metrics.exposition().decode())
    assert found is not None
    assert float(found[1]) == 7


def test_what_is_started(tmp_path: Path) -> None:
    mortal, others = soak.plans(tmp_path)
    assert [plan.name for plan in others] == ["stub-0", "triton", "milvus", "gateway"]
    config = load(tmp_path / "gateway.yaml")
    for model in config.models:
        assert {endpoint.url for endpoint in model.endpoints} == {mortal.address, others[0].address}
    assert config.semantic_cache.backend_type == "milvus"
    assert config.milvus.connection.port != 19530


def test_too_short_a_run_is_refused() -> None:
    command = [sys.executable, "-m", "bench.soak", "--minutes", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "at least 6 looks" in ended.stderr
