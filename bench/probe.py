"""Single requests to the servers of a run: to fill a cache, and to see whether what was measured is what was meant."""

from __future__ import annotations

import http.client
import json
import re
from urllib.parse import urlsplit

from bench.load import PATH, TOKEN
from bench.servers import Server

SECONDS = 30
OUTCOME = re.compile(r'^fingerpost_cache_outcomes_total\{outcome="([\w-]+)"\} ([\d.e+]+)$', re.MULTILINE)


class Unexpected(Exception):
    """A server did not answer as it should."""


def ask(method: str, url: str, body: bytes | None = None) -> str:
    """The body of the answer. Raises `Unexpected` unless its status is 200."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=SECONDS)
    try:
        headers = {"Content-Type": "application/json", "Authorization": TOKEN}
        connection.request(method, parts.path or "/", body, headers)
        response = connection.getresponse()
        answer = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise Unexpected(f"{url}: {error}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise Unexpected(f"{url}: status {response.status}: {answer[:500]}")
    return answer


def complete(server: Server, body: bytes) -> None:
    ask("POST", server.address + PATH, body)


def answered(stub: Server) -> int:
    """Completions of the stub so far."""
    return int(json.loads(ask("GET", stub.address))["answered"])


def outcomes(exposition: str) -> dict[str, float]:
    """Requests by what the gateway's cache did, from its metrics."""
    return {name: float(value) for name, value in OUTCOME.findall(exposition)}


def share(before: dict[str, float], after: dict[str, float], outcome: str) -> float:
    """Of what came between two looks at `outcomes`; 0 when nothing came."""
    came = {name: value - before.get(name, 0) for name, value in after.items()}
    total = sum(came.values())
    return came.get(outcome, 0) / total if total else 0.0
