"""How the gateway ends, takes a new configuration, and serves from several processes: real ones, over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.config import ConfigError, load
from gateway.tally import RUNNING, Alone, Board, Together
from gateway.tenants import digest
from gateway.workers import MOST_PAUSE_SECONDS, STEADY_SECONDS, pause
from tests.conftest import PATIENCE_SECONDS, ROOT, Server, Tree, free_port, merged, running, wait_until
from tests.stub_triton import write_manifests

KEY = "fp-of-a-test"
LARGE = "large"
QUESTION = [{"role": "user", "content": "How long is a river?"}]
BROKEN_OFF = (httpx.RemoteProtocolError, httpx.ReadError)


@dataclass(frozen=True)
class Gateway:
    """A gateway of a test's own, and its file."""

    tree: Tree
    process: subprocess.Popen[bytes]
    file: Path
    log: Path

    @property
    def port(self) -> int:
        return int(self.tree["listen"]["port"])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def said(self) -> str:
        return self.log.read_text()

    def configure(self, changes: Tree) -> None:
        """Write another file, and say so."""
        self.file.write_text(yaml.safe_dump(merged(self.tree, changes)))
        self.process.send_signal(signal.SIGHUP)

    def get(self, path: str) -> httpx.Response:
        """On a connection of its own."""
        return httpx.get(self.url + path, timeout=60)

    def models(self) -> set[str]:
        return {model["id"] for model in self.get("/v1/models").json()["data"]} - {"auto"}

    def metric(self, name: str) -> float:
        """The value of a line of /metrics; 0 when it is not there."""
        found = re.search(rf"^fingerpost_{re.escape(name)} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def is_reached(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 5).close()
        except ConnectionRefusedError:
            return False
        return True

    def workers(self) -> list[int]:
        """Their processes, in the order in which they were started."""
        return [int(found) for found in re.findall(r"worker \d+ is process (\d+)", self.said)]

    def ends(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)


def model(name: str, *urls: str) -> Tree:
    price = {"input": 1, "output": 1}
    return {
        "name": name,
        "endpoints": list(urls),
        "price_per_million_tokens": price,
        "context_window": 8192,
        "size": "small",
    }


Start = Callable[..., Gateway]


@pytest.fixture
def start(stub: Server, tmp_path: Path) -> Iterator[Start]:
    """Starts gateways: one model at the stub, the cache in memory, no Triton."""
    with contextlib.ExitStack() as stack:

        def started(changes: Tree | None = None, *arguments: str) -> Gateway:
            port = free_port()
            folder = tmp_path / str(port)
            tree = merged(
                {
                    "listen": {"port": port, "drain_seconds": 600},
                    "data_dir": str(folder / "data"),
                    "triton": {
                        "address": "127.0.0.1:9",
                        "model_repository": str(write_manifests(folder / "repository")),
                    },
                    "models": [model("small", stub.url)],
                    "policy": {"default": "small"},
                    "upstream": {"health_check": {"enabled": False}},
                },
                changes or {},
            )
            file, log = folder / "config.yaml", folder / "gateway.log"
            file.write_text(yaml.safe_dump(tree))
            command = [sys.executable, "-m", "gateway", "--config", str(file), *arguments]
            gateway = Gateway(tree, stack.enter_context(running(command, log)), file, log)
            workers = int(tree["listen"].get("workers", 1))
            wait_until(
                "the gateway",
                lambda: gateway.process.poll() is not None or (gateway.is_reached() and served(gateway) == workers),
                PATIENCE_SECONDS,
            )
            assert gateway.process.poll() is None, gateway.said
            return gateway

        yield started


def served(gateway: Gateway) -> int:
    """How many processes have started to serve."""
    return gateway.said.count("listening on 127.0.0.1 port")


@pytest.fixture(autouse=True)
def well(stub: Server) -> Iterator[None]:
    have(stub, "none")
    yield
    have(stub, "none")


def have(stub: Server, fault: str) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": fault}).raise_for_status()


def seen(stub: Server, what: str) -> Any:
    return httpx.get(f"{stub.url}/stub").json()[what]


def ask(gateway: Gateway, **fields: Any) -> httpx.Response:
    """One answer, on a connection of its own."""
    headers = fields.pop("headers", {"authorization": f"Bearer {KEY}"})
    body = {"model": "small", "messages": QUESTION, **fields}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=120)


class Stream:
    """An answer that goes on until the stub is told to have none any more."""

    def __init__(self, gateway: Gateway) -> None:
        self._client = httpx.Client(timeout=120)
        body = {"model": "small", "messages": QUESTION, "stream": True}
        self._streaming = self._client.stream(
            "POST",
            f"{gateway.url}/v1/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {KEY}"},
        )
        self.response = self._streaming.__enter__()
        assert self.response.status_code == 200, self.response.read()
        self._chunks = self.response.iter_raw()
        self.go_on()

    def go_on(self) -> None:
        """Read some of what is new."""
        assert next(self._chunks)

    def rest(self) -> bytes:
        """All that is left; raises one of BROKEN_OFF when it does not come to its end."""
        try:
            return b"".join(self._chunks)
        finally:
            self.close()

    def close(self) -> None:
        self._streaming.__exit__(None, None, None)
        self._client.close()


@pytest.fixture
def endless(stub: Server) -> Iterator[Callable[[Gateway], Stream]]:
    """Begins streams that end when the stub is told to have no fault."""
    have(stub, "endless")
    with contextlib.ExitStack() as stack:

        def begin(gateway: Gateway) -> Stream:
            stream = Stream(gateway)
            stack.callback(stream.close)
            return stream

        yield begin


Endless = Callable[[Gateway], Stream]


# The end


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_go_on_to_their_end(start: Start, endless: Endless, stub: Server, workers: int) -> None:
    gateway = start({"listen": {"workers": workers}})
    kept = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    streams = [endless(gateway) for _ in range(8)]  # one at least in the worker that has the connection

    def ready() -> tuple[int, str, str | None]:
        kept.request("GET", "/ready")
        answer = kept.getresponse()
        return answer.status, json.loads(answer.read())["status"], answer.headers["connection"]

    assert ready() == (503, "not ready", None)  # without Triton
    gateway.process.terminate()
    wait_until("all to know", lambda: gateway.said.count("told to stop; ") == workers)
    assert ready() == (503, "draining", "close")
    wait_until("new connections to be refused", lambda: not gateway.is_reached())
    for stream in streams:
        stream.go_on()
    assert gateway.process.poll() is None
    have(stub, "none")
    for stream in streams:
        stream.rest()
    assert gateway.ends() == 0


def test_an_answer_in_one_piece_is_finished(start: Start, stub: Server) -> None:
    gateway, before = start(), len(seen(stub, "received"))
    have(stub, "slow")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, gateway)
        wait_until("the question to arrive", lambda: len(seen(stub, "received")) > before)
        gateway.process.send_signal(signal.SIGINT)
        answer = asked.result()
    assert answer.status_code == 200
    assert gateway.ends() == 0


def test_connections_on_which_nothing_is_asked_keep_nobody(start: Start) -> None:
    gateway = start()
    with httpx.Client() as client, socket.create_connection(("127.0.0.1", gateway.port)):
        assert client.get(f"{gateway.url}/health").status_code == 200
        gateway.process.terminate()
        assert gateway.ends() == 0


def test_a_client_that_never_says_goodbye_keeps_nobody(start: Start, tmp_path: Path) -> None:
    files = certificate(tmp_path, "server")
    gateway = start({"listen": {"tls": files}})
    context = ssl.create_default_context(cafile=files["cert_file"])
    with (
        socket.create_connection(("127.0.0.1", gateway.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as kept,
    ):
        kept.sendall(b"GET /health HTTP/1.1\r\nhost: gateway\r\n\r\n")
        assert kept.recv(4096).startswith(b"HTTP/1.1 200")
        told = time.monotonic()
        gateway.process.terminate()
        assert gateway.ends() == 0
        assert time.monotonic() - told < 20  # left alone, TLS waits for 30


@pytest.mark.parametrize("arguments", [(), ("--drain-seconds", "0.5")], ids=["key", "option"])
def test_what_lasts_longer_is_broken_off(
    start: Start, endless: Endless, stub: Server, arguments: tuple[str, ...]
) -> None:
    gateway = start({} if arguments else {"listen": {"drain_seconds": 0.5}}, *arguments)
    stream, before = endless(gateway), seen(stub, "abandoned")
    gateway.process.terminate()
    with pytest.raises(BROKEN_OFF):
        stream.rest()
    assert gateway.ends() == 0
    wait_until("the model to be told", lambda: seen(stub, "abandoned") > before)
    assert "1 requests are still under way after 0.5 s" in gateway.said
    assert "Traceback" not in gateway.said


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_told_twice_it_ends_at_once(start: Start, endless: Endless, again: signal.Signals, workers: int) -> None:
    gateway = start({"listen": {"workers": workers}})
    stream = endless(gateway)
    gateway.process.terminate()
    wait_until("new connections to be refused", lambda: not gateway.is_reached())
    gateway.process.send_signal(again)
    assert gateway.ends() == 1
    with pytest.raises(BROKEN_OFF):
        stream.rest()


# Another configuration


def applied(gateway: Gateway, times: int = 1) -> Callable[[], bool]:
    return lambda: gateway.metric('config_reloads_total{outcome="applied"}') == times


def refused(gateway: Gateway, times: int = 1) -> Callable[[], bool]:
    return lambda: gateway.metric('config_reloads_total{outcome="refused"}') == times


def test_new_requests_have_the_new_configuration_and_the_others_end_in_the_old(
    start: Start, endless: Endless, stub: Server
) -> None:
    gateway = start()
    stream = endless(gateway)
    assert gateway.metric(f'endpoint_outstanding{{endpoint="{stub.url}",model="small"}}') == 1
    gateway.configure({"models": [model(LARGE, stub.url)], "policy": {"default": LARGE}})
    wait_until("the other model", lambda: gateway.models() == {LARGE})
    assert ask(gateway, model="small").status_code == 404
    assert "in an earlier configuration has ended" not in gateway.said
    assert f'endpoint_outstanding{{endpoint="{stub.url}",model="small"}}' not in gateway.get("/metrics").text
    stream.go_on()
    have(stub, "none")
    stream.rest()
    wait_until("the old one to be closed", lambda: "in an earlier configuration has ended" in gateway.said)
    assert applied(gateway)()
    assert gateway.metric("config_last_reload_successful") == 1
    assert ask(gateway, model=LARGE).status_code == 200


def test_the_last_of_several_changes_is_in_force(start: Start, stub: Server) -> None:
    gateway = start()
    for number in range(20):
        gateway.configure({"models": [model("small", stub.url), model(f"model-{number}", stub.url)]})
    wait_until("the last one", lambda: gateway.models() == {"small", "model-19"})


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_not_valid_is_refused_in_the_words_of_the_start(start: Start, stub: Server, workers: int) -> None:
    gateway = start({"listen": {"workers": workers}})
    read = gateway.metric("config_seconds")
    gateway.configure({"models": [model(LARGE, stub.url)]})  # whose policy names another one
    wait_until("the refusal", refused(gateway))
    command = [sys.executable, "-m", "gateway", "--check", "--config", str(gateway.file)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "policy.default: unknown model" in checked.stderr
    assert checked.stderr in gateway.said
    assert gateway.metric("config_last_reload_successful") == 0
    assert gateway.metric("config_seconds") == read
    assert gateway.models() == {"small"}
    assert ask(gateway).status_code == 200
    gateway.file.write_text("models: [")
    gateway.process.send_signal(signal.SIGHUP)
    wait_until("the refusal", refused(gateway, 2))
    gateway.configure({})
    wait_until("a valid one", applied(gateway))
    assert gateway.metric("config_last_reload_successful") == 1
    assert gateway.metric("config_seconds") > read


def test_what_takes_a_restart_is_named(start: Start, tmp_path: Path) -> None:
    gateway = start()
    files = certificate(tmp_path, "server")
    fixed = {"host": "127.0.0.2", "port": free_port(), "workers": 3, "tls": files}
    gateway.configure({"listen": fixed, "data_dir": str(tmp_path / "other")})
    wait_until("the refusal", refused(gateway))
    for key in ("listen.host", "listen.port", "listen.workers", "listen.tls", "data_dir"):
        assert f"{gateway.file}: {key}: takes a restart" in gateway.said
    assert "(got 3)" in gateway.said
    assert gateway.models() == {"small"}


@pytest.mark.parametrize("workers", [1, 3])
def test_limits_hold_across_configurations_and_workers(
    start: Start, endless: Endless, stub: Server, workers: int
) -> None:
    tenants = [{"name": "search", "key_sha256": [digest(KEY)], "concurrent_requests": 1}]
    gateway = start({"tenants": tenants, "listen": {"workers": workers}})
    stream = endless(gateway)
    assert {ask(gateway).status_code for _ in range(8)} == {429}
    others = [{**tenants[0], "name": "other", "key_sha256": [digest("fp-other")]}]
    gateway.configure({"tenants": [*others, *tenants]})
    other = {"x-api-key": "fp-other"}
    wait_until("the other tenant", lambda: {ask(gateway, headers=other).status_code for _ in range(8)} == {200})
    assert {ask(gateway).status_code for _ in range(8)} == {429}
    have(stub, "none")
    stream.rest()
    wait_until("the place to be free", lambda: ask(gateway).status_code == 200)


def test_the_cache_in_memory_stays(start: Start, stub_triton: Tree, stub: Server) -> None:
    gateway = start({"triton": stub_triton})

    def outcome() -> str:
        return str(ask(gateway, model="auto").headers["x-fingerpost-cache"])

    wait_until("Triton", lambda: outcome() in ("miss", "hit-exact"))
    assert outcome() == "hit-exact"
    gateway.configure({"models": [model("small", stub.url), model(LARGE, stub.url)]})
    wait_until("the other model", lambda: LARGE in gateway.models())
    assert outcome() == "hit-exact"
    gateway.configure({"semantic_cache": {"max_entries": 7}})
    wait_until("the other size", lambda: LARGE not in gateway.models())
    assert outcome() == "miss"


def certificate(folder: Path, name: str) -> Tree:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    files = {"cert_file": str(folder / f"{name}.pem"), "key_file": str(folder / f"{name}.key")}
    subprocess.run(
        [*command, "-keyout", files["key_file"], "-out", files["cert_file"]], check=True, capture_output=True
    )
    return files


@pytest.mark.parametrize("workers", [1, 2])
def test_a_renewed_certificate_is_shown(start: Start, tmp_path: Path, workers: int) -> None:
    files = certificate(tmp_path, "server")
    gateway = start({"listen": {"tls": files, "workers": workers}})

    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", gateway.port), timeout=60)

    first = Path(files["cert_file"]).read_text()
    assert shown() == first
    certificate(tmp_path, "server")
    second = Path(files["cert_file"]).read_text()
    assert second != first
    gateway.process.send_signal(signal.SIGHUP)
    wait_until("the new certificate", lambda: {shown() for _ in range(8)} == {second})


# Several workers


def test_the_figures_of_all_workers_are_one(start: Start, stub: Server) -> None:
    gateway = start({"listen": {"workers": 3}})
    assert gateway.metric("workers") == 3
    assert {ask(gateway).status_code for _ in range(24)} == {200}
    asked = 'requests_total{route="/v1/chat/completions",status="200"}'
    assert [gateway.metric(asked) for _ in range(8)] == [24] * 8
    assert gateway.metric('first_byte_seconds_count{outcome="bypass"}') == 24
    written = sorted(path.name for path in Path(gateway.tree["data_dir"]).glob("metrics/*/counter_*.db"))
    assert written == ["counter_0.db", "counter_1.db", "counter_2.db", "counter_parent.db"]

    def states() -> float:
        return gateway.metric(f'endpoint_state{{endpoint="{stub.url}",model="small",state="up"}}')

    wait_until("each worker to tell of its endpoint", lambda: states() == 3)


def test_a_verdict_may_come_to_any_worker(start: Start) -> None:
    gateway = start({"listen": {"workers": 3}})

    def judge(answer: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.post(f"{gateway.url}/v1/feedback", json={"id": answer, "good": True}, headers=headers, timeout=60)

    ids = [ask(gateway).headers["x-request-id"] for _ in range(6)]
    assert {judge(answer).status_code for answer in ids for _ in range(2)} == {200}
    assert gateway.metric('feedback_total{verdict="good"}') == 12
    unknown = judge("chatcmpl-unknown")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "answer_not_found")
    os.kill(gateway.workers()[0], signal.SIGKILL)
    wait_until("its death to be noticed", lambda: "worker 0 was killed" in gateway.said)
    assert {judge("chatcmpl-unknown").status_code for _ in range(6)} <= {404}


def test_a_worker_that_dies_is_replaced(start: Start) -> None:
    gateway = start({"listen": {"workers": 2}})
    assert {ask(gateway).status_code for _ in range(8)} == {200}
    counted = gateway.metric('requests_total{route="/v1/chat/completions",status="200"}')
    gateway.file.write_text("models: [")  # whoever starts later still has the configuration that is in force
    os.kill(gateway.workers()[0], signal.SIGKILL)
    wait_until("another worker", lambda: served(gateway) == 3, PATIENCE_SECONDS)
    assert "worker 0 was killed by SIGKILL; another one is started in" in gateway.said
    assert len(gateway.workers()) == 3
    assert gateway.metric("worker_restarts_total") == 1
    assert gateway.metric("workers") == 2
    assert gateway.metric('requests_total{route="/v1/chat/completions",status="200"}') == counted
    assert {ask(gateway).status_code for _ in range(16)} == {200}
    gateway.process.terminate()
    assert gateway.ends() == 0


def test_what_a_dead_worker_had_under_way_counts_no_longer(start: Start, endless: Endless) -> None:
    tenants = [{"name": "search", "key_sha256": [digest(KEY)], "concurrent_requests": 1}]
    gateway = start({"tenants": tenants, "listen": {"workers": 2}})
    stream = endless(gateway)
    assert ask(gateway).status_code == 429
    for process in gateway.workers():
        os.kill(process, signal.SIGKILL)
    with pytest.raises(BROKEN_OFF):
        stream.rest()
    wait_until("other workers", lambda: served(gateway) == 4, PATIENCE_SECONDS)
    endless(gateway)


def test_all_workers_stop_when_their_group_is_told_to(start: Start, endless: Endless, stub: Server) -> None:
    gateway = start({"listen": {"workers": 2}})
    streams = [endless(gateway) for _ in range(4)]
    os.killpg(gateway.process.pid, signal.SIGTERM)  # as a supervisor does: the workers are told twice
    wait_until("new connections to be refused", lambda: not gateway.is_reached())
    for stream in streams:
        stream.go_on()
    have(stub, "none")
    for stream in streams:
        stream.rest()
    assert gateway.ends() == 0
    assert "another one" not in gateway.said


def test_all_workers_take_the_new_configuration(start: Start, stub: Server) -> None:
    gateway = start({"listen": {"workers": 3}})
    os.killpg(gateway.process.pid, signal.SIGHUP)  # as a terminal does: workers leave it to their parent
    wait_until("the same once more", applied(gateway))
    gateway.configure({"models": [model("small", stub.url), model(LARGE, stub.url)]})
    wait_until("the other model", applied(gateway, 2))
    wait_until("it everywhere", lambda: gateway.said.count("worker 2: the new configuration is in force") == 2)
    wait_until("it everywhere", lambda: all(LARGE in gateway.models() for _ in range(16)))
    assert gateway.process.poll() is None


def failed(gateway: Gateway, times: int = 1) -> Callable[[], bool]:
    return lambda: gateway.metric('config_reloads_total{outcome="failed"}') == times


STAYS = "the new configuration cannot be used, the one before stays in force"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_opened_leaves_the_configuration_before_in_force(
    start: Start, stub: Server, workers: int
) -> None:
    gateway = start({"listen": {"workers": workers}})
    both = {"models": [model("small", stub.url), model(LARGE, stub.url)]}
    gateway.configure({**both, "semantic_cache": {"max_entries": 10**12}})  # there is no such memory
    wait_until("the failure", failed(gateway))
    assert STAYS in gateway.said
    assert "MemoryError" in gateway.said
    assert gateway.metric("config_last_reload_successful") == 0
    for _ in range(8):
        assert gateway.models() == {"small"}
        assert ask(gateway).status_code == 200
    assert served(gateway) == workers  # all that were started serve still
    gateway.configure(both)
    wait_until("a better one", applied(gateway))
    assert all(gateway.models() == {"small", LARGE} for _ in range(8))
    assert "another one is started" not in gateway.said


def test_when_one_worker_cannot_follow_all_stay(start: Start, stub: Server) -> None:
    gateway = start({"listen": {"workers": 2}})
    first, second = re.findall(r"(worker \d+) is process", gateway.said)
    memory = int(re.findall(r"VmSize:\s+(\d+)", Path(f"/proc/{gateway.workers()[1]}/status").read_text())[0]) * 1024
    resource.prlimit(gateway.workers()[1], resource.RLIMIT_AS, (memory + 2**28, resource.RLIM_INFINITY))
    both = {"models": [model("small", stub.url), model(LARGE, stub.url)]}
    gateway.configure({**both, "semantic_cache": {"max_entries": 400_000}})  # 600 MB of vectors
    wait_until("the failure", failed(gateway))
    assert gateway.said.count(f"{first}: the new configuration is in force") == 2  # there and back
    assert f"{second}: {STAYS}" in gateway.said
    assert all(gateway.models() == {"small"} for _ in range(16))
    assert gateway.metric("config_last_reload_successful") == 0
    gateway.configure(both)
    wait_until("a better one", applied(gateway))
    assert all(gateway.models() == {"small", LARGE} for _ in range(16))
    assert "another one is started" not in gateway.said


def test_a_worker_that_begins_meanwhile_has_the_new_configuration(start: Start, stub: Server) -> None:
    gateway = start({"listen": {"workers": 2}})
    os.kill(gateway.workers()[0], signal.SIGKILL)
    wait_until("another worker", lambda: len(gateway.workers()) == 3)
    assert served(gateway) == 2
    gateway.configure({"models": [model("small", stub.url), model(LARGE, stub.url)]})
    wait_until("the other model", applied(gateway))
    wait_until("the worker to serve", lambda: served(gateway) == 3, PATIENCE_SECONDS)
    wait_until("it to follow", lambda: "worker 0: the new configuration is in force" in gateway.said)
    assert all(LARGE in gateway.models() for _ in range(16))


def test_workers_end_with_whoever_started_them(start: Start) -> None:
    gateway = start({"listen": {"workers": 2}})
    gateway.process.kill()
    wait_until("the workers to end", lambda: not gateway.is_reached())


@pytest.mark.parametrize("workers", [1, 2])
def test_an_address_that_is_taken_stops_the_start(start: Start, workers: int) -> None:
    first = start({"listen": {"workers": 2}})
    first.file.write_text(yaml.safe_dump(merged(first.tree, {"listen": {"workers": workers}})))
    command = [sys.executable, "-m", "gateway", "--config", str(first.file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert ended.returncode == 2
    words = f"{first.file}: listen.port: cannot listen on 127.0.0.1:{first.port}: Address already in use"
    assert words in ended.stderr
    assert first.metric("workers") == 2


def test_a_file_of_milvus_lite_takes_one_process(tmp_path: Path) -> None:
    cache = {"backend_type": "milvus", "backend_config_path": str(tmp_path / "milvus.yaml")}
    tree = {"models": [model("small", "http://vllm")], "policy": {"default": "small"}, "semantic_cache": cache}
    (tmp_path / "milvus.yaml").write_text(yaml.safe_dump({"connection": {"uri": "data/cache.db"}}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**tree, "listen": {"workers": 2}}))
    with pytest.raises(ConfigError, match=r"milvus.yaml: connection.uri: .*listen.workers is more"):
        load(tmp_path / "config.yaml")


def test_the_pauses_between_workers_that_die_grow_to_a_limit() -> None:
    pauses = [pause(0, 1)]
    for _ in range(9):
        pauses.append(pause(pauses[-1], 1))
    assert pauses[:4] == [0.5, 1, 2, 4]
    assert pauses[-1] == MOST_PAUSE_SECONDS
    assert pause(pauses[-1], STEADY_SECONDS) == 0.5


def test_a_board_is_the_same_for_all() -> None:
    board = Board(workers=2)
    first, second = (Together(board.fileno(), number, 2) for number in range(2))
    for worker in (first, second):
        worker.place(board.place(["a", "b"]))
    with first("a").lock():
        first("a").run(2)
        first("a").cells[0] = 7.5
    second("a").run(1)
    assert (second("a").running, second("b").running, second("a").cells[0]) == (3, 0, 7.5)
    second.place(board.place(["c", "a"]))
    kept = second("a")
    assert [second(name).running for name in "abc"] == [3, 0, 0]
    board.forget(0)
    assert (kept.running, first("a").running, kept.cells[0]) == (1, 1, 7.5)
    assert len(kept.cells) == RUNNING + 2


def test_one_process_keeps_a_tenant_s_tally() -> None:
    tallies = Alone()
    tallies("a").run(1)
    assert (tallies("a").running, tallies("b").running) == (1, 0)
