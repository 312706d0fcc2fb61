"""Starts the load generators, each as a process of its own, and reads what they print."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.servers import BIN

SCRIPT = Path(__file__).with_name("load.lua")
PATH = "/v1/chat/completions"
TOKEN = "Bearer bench"  # noqa: S105 (nobody asks for one)
MOST_SECONDS = 10  # that an answer may take
SPARE_SECONDS = 60  # that a generator may take beyond its own time


class LoadFailed(Exception):
    """A load generator did not say what it measured."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a load generator saw in one run."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int
    cpu_seconds: float  # of its own


def wrk(address: str, bodies: Path, in_flight: int, seconds: int, headers: Mapping[str, str]) -> Load:
    """Post the lines of `bodies` in turn, on as many connections as requests are to be in flight."""
    sent = {"Content-Type": "application/json", "Authorization": TOKEN, **headers}
    command = [str(BIN / "wrk"), "--threads", "1", "--connections", str(in_flight), "--duration", f"{seconds}s"]
    command += ["--timeout", f"{MOST_SECONDS}s", "--script", str(SCRIPT)]
    for name, value in sent.items():
        command += ["--header", f"{name}: {value}"]
    return run([*command, address + PATH, "--", str(bodies)], seconds)


def triton_calls(address: str, texts: Path, in_flight: int, seconds: int) -> Load:
    asked = ("--in-flight", str(in_flight), "--seconds", str(seconds))
    return run([sys.executable, "-m", "bench.calls", address, str(texts), *asked], seconds)


def run(command: Sequence[str], seconds: int) -> Load:
    used = children_seconds()
    figures = last_json(output(command, seconds))
    own = figures.pop("cpu_seconds", None)  # of a Python process its start would count, too
    return Load(**figures, cpu_seconds=children_seconds() - used if own is None else own)


def streams(address: str, body: Path, number: int, seconds: float, *, burst: bool) -> dict[str, Any]:
    asked = ("--streams", str(number), "--seconds", str(seconds), *(("--burst",) if burst else ()))
    return last_json(output([sys.executable, "-m", "bench.streams", address + PATH, str(body), *asked], seconds))


def output(command: Sequence[str], seconds: float) -> str:
    """Raises `LoadFailed`."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + SPARE_SECONDS)
    except FileNotFoundError as error:
        raise LoadFailed(f"{command[0]} is not there; `make bench` installs it") from error
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"{command[0]} did not end") from error
    except subprocess.CalledProcessError as error:
        raise LoadFailed(f"{' '.join(command)} ended with exit status {error.returncode}: {error.stderr}") from error
    return ended.stdout


def last_json(printed: str) -> dict[str, Any]:
    """The object in the last line. Raises `LoadFailed`."""
    lines = printed.splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise LoadFailed(f"there are no figures in {printed!r}") from error
    return dict(found)


def children_seconds() -> float:
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def lines(path: Path, written: Iterator[bytes] | Sequence[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in written))
    return path
