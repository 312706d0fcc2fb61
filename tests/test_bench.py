"""`make bench`: what it makes of its measurements, and that its stub and its client of streams do what they say."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench import load, probe, prompts, report, servers
from bench.__main__ import rotated, settings
from bench.cases import CACHING, CASES, LITELLM, NAMED, PLAIN, STUB, TRITON
from bench.figures import Sample, StreamSample, added_ms, median, paired, percentile, rate_ratio
from bench.stub import EVENTS, request_length
from gateway.answer import ChunkAssembly, from_completion
from gateway.config import load as load_config
from gateway.metrics import Metrics
from gateway.sse import FrameSplitter, data
from tests.conftest import ROOT, Server, StartGateway, Tree, answers, free_port, models, running, wait_until


def sample(case: str = "named", in_flight: int = 1, number: int = 0, **fields: Any) -> Sample:
    given = {
        "requests": 1000,
        "seconds": 1.0,
        "p50_ms": 1.0,
        "p99_ms": 2.0,
        "errors": 0,
        "right": 1.0,
        "server_cpu_seconds": 0.5,
        "generator_cpu_seconds": 0.1,
    }
    return Sample(case=case, in_flight=in_flight, round=number, **{**given, **fields})


def streamed(server: str, kind: str = "steady", **fields: Any) -> StreamSample:
    given = {"streams": 64, "p50_ms": 1.0, "p99_ms": 2.0, "errors": 0, "generator_cores": 0.1}
    return StreamSample(server=server, kind=kind, round=0, **{**given, **fields})


def run_of(*samples: Sample, streams: tuple[StreamSample, ...] = (), **resident_mb: float) -> report.Run:
    resident = {name.replace("_", "-"): size for name, size in resident_mb.items()}
    return report.Run({"run": "a test"}, {"machine": "this"}, {"wrk": "4.1.0"}, samples, streams, resident)


# What is made of the figures


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0.0), ([3.0], 0.99, 3.0), ([4.0, 1.0, 3.0, 2.0], 0.5, 3.0), (list(map(float, range(100))), 0.99, 99.0)],
)
def test_percentile(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_median_of_what_is_there() -> None:
    assert median([3.0, None, 1.0, 2.0]) == 2.0
    assert median([None]) is None


def test_figures_are_compared_within_a_round() -> None:
    """The machine was slow in round 1: medians taken apart would say that the gateway takes 0.2 ms, not 0.5."""
    named = [sample(number=i, p50_ms=p50) for i, p50 in enumerate([1.0, 3.0, 0.7])]
    stub = [sample("stub", number=i, p50_ms=p50) for i, p50 in enumerate([0.5, 2.5, 0.1])]
    assert paired(named, stub, added_ms) == pytest.approx(0.5)
    assert paired(named, stub[:1], added_ms) == pytest.approx(0.5)
    assert paired(named, [], added_ms) is None


def test_a_round_without_answers_is_not_compared() -> None:
    assert paired([sample()], [sample("litellm", requests=0, p50_ms=0.0)], rate_ratio) is None


def test_rates_and_processor_time() -> None:
    taken = sample(requests=500, seconds=2.0, server_cpu_seconds=1.0, generator_cpu_seconds=0.5)
    assert (taken.per_second, taken.cpu_ms, taken.generator_cores) == (250.0, 2.0, 0.25)
    assert sample(requests=0).cpu_ms is None


# Targets


REACHED = (
    sample("stub", p50_ms=0.1, requests=9000),
    sample("named", p50_ms=1.1),
    sample("triton", p50_ms=10.0),
    sample("miss", p50_ms=15.0),
    sample("named", 16, requests=3000),
    sample("litellm", 16, requests=100),
    sample("exact", 16, requests=3000),
)
STREAMS = tuple(streamed(server, kind) for kind in report.KINDS for server in (STUB, PLAIN))


def test_targets_are_reached_at_their_limits() -> None:
    run = run_of(*REACHED, streams=STREAMS, gateway_plain=120.0, gateway_caching=150.0, litellm=900.0)
    assert [target.reached for target in report.targets(run)] == [True] * 7
    assert [target.measured for target in report.targets(run)] == pytest.approx(
        [1.0, 30.0, 3000.0, 1.5, 0.0, 0.0, 150.0]
    )


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        (sample("named", p50_ms=1.2), 0),
        (sample("litellm", 16, requests=101), 1),
        (sample("exact", 16, requests=2999), 2),
        (sample("triton", p50_ms=9.9), 3),
    ],
)
def test_a_target_that_is_missed(worse: Sample, missed: int) -> None:
    same = (worse.case, worse.in_flight)
    run = run_of(
        *(one for one in REACHED if (one.case, one.in_flight) != same), worse, streams=STREAMS, gateway_plain=1.0
    )
    assert [target.reached for target in report.targets(run)] == [number != missed for number in range(7)]


def test_what_was_not_measured_is_not_judged() -> None:
    assert {target.reached for target in report.targets(run_of())} == {None}


# Doubts


@pytest.mark.parametrize(
    ("doubtful", "words"),
    [
        (sample(errors=3), "gateway, named model, no cache, 1 in flight, round 1: 3 errors"),
        (sample(requests=0, p50_ms=0.0), "0 answers"),
        (sample("exact", right=0.5), "only 50.0 % of the answers"),
        (sample("exact", generator_cpu_seconds=0.97), "the load generator took 0.97 of a core"),
    ],
)
def test_a_doubtful_measurement_is_named(doubtful: Sample, words: str) -> None:
    [problem] = report.problems(run_of(doubtful))
    assert words in problem


def test_a_stub_that_is_hardly_faster_is_named() -> None:
    [problem] = report.problems(run_of(sample("stub", requests=2900), sample("named")))
    assert problem.endswith("the stub alone answers only 2.9 times as many")
    assert not report.problems(run_of(sample("stub", requests=3000, generator_cpu_seconds=1.0), sample("named")))


@pytest.mark.parametrize(
    "doubtful", [streamed(PLAIN, errors=1), streamed(PLAIN, streams=0), streamed(STUB, generator_cores=0.6)]
)
def test_doubtful_streams_are_named(doubtful: StreamSample) -> None:
    assert len(report.problems(run_of(streams=(doubtful,)))) == 1


# What is written


def test_the_table_has_each_figure_beside_its_target() -> None:
    text = report.as_markdown(run_of(*REACHED, streams=STREAMS, gateway_plain=120.4))
    assert "| named model, requests/s beside LiteLLM's, 16 in flight | ≥ 30 times | 30.00 | yes |" in text
    assert "| exact hits, 16 in flight | ≥ 3,000 /s | 3,000 | yes |" in text
    assert (
        "| gateway, named model, no cache | 16 | 1.00 | 2.00 | 3,000 | 0.167 | 30.0 times LiteLLM's requests/s |"
        in text
    )
    assert "| gateway, named model, no cache | begun at once | 1.00 | 2.00 | +0.00 | 64 |" in text
    assert "| gateway-plain | 120 |" in text
    assert "- the stub alone, 1 in flight: 9,000 requests/s, 9.0 times what the gateway passes through" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| gateway, named")}) == 2


def test_a_missed_target_shows() -> None:
    text = report.as_markdown(run_of(sample("exact", 16, requests=10)))
    assert "| exact hits, 16 in flight | ≥ 3,000 /s | 10 | **no** |" in text
    assert "| resident memory of a worker | ≤ 150 MB |  | not measured |" in text


def test_the_json_has_every_measurement() -> None:
    written = json.loads(json.dumps(report.as_json(run_of(*REACHED, sample(errors=1), streams=STREAMS))))
    assert [one["case"] for one in written["samples"]][:2] == ["stub", "named"]
    assert written["samples"][0]["per_second"] == 9000
    assert len(written["problems"]) == 1
    assert [target["reached"] for target in written["targets"]][-1] is None


# What is asked


def test_new_texts_are_new_and_the_same_in_every_run() -> None:
    texts = list(islice(prompts.new_texts(4), 20_000))
    assert len(set(texts)) == len(texts)
    assert texts[:3] == list(islice(prompts.new_texts(4), 3))
    words = prompts.WORDS.split()
    assert len(set(words)) == len(words) > 100


def test_wordings_differ_in_capitals_and_spaces_alone() -> None:
    """The gateway remembers 1,024 texts: none must come back sooner."""
    texts = list(islice(prompts.wordings(), 6000))
    assert all(len(set(texts[i : i + 2000])) == 2000 for i in range(0, 4000, 500))
    assert {" ".join(text.lower().split()) for text in texts} == {wording.lower() for _, wording in prompts.PAIRS}
    assert not {question for question, _ in prompts.PAIRS} & set(texts)
    assert all(text == text.strip() for text in texts)


def test_bodies_are_one_line_each() -> None:
    body = prompts.body("auto", "two\nlines", stream=True)
    assert b"\n" not in body
    assert json.loads(body)["stream"] is True
    assert json.loads(body)["messages"][-1] == {"role": "user", "content": "two\nlines"}


# Whether it was what was meant


def test_outcomes_are_read_from_the_gateway_s_metrics() -> None:
    metrics = Metrics()
    for outcome, times in (("miss", 2), ("hit-exact", 3_000_000)):
        metrics.cache.labels(outcome).inc(times)
    assert probe.outcomes(metrics.exposition().decode()) == {"miss": 2.0, "hit-exact": 3e6}


def test_share_of_an_outcome() -> None:
    assert probe.share({"miss": 5}, {"miss": 6, "hit-exact": 9}, "hit-exact") == 0.9
    assert probe.share({"miss": 5}, {"miss": 5}, "miss") == 0.0
    assert probe.share({}, {"miss": 5}, "hit-exact") == 0.0


@pytest.mark.parametrize("printed", ["", "Running 1s test\n", "{\n"])
def test_a_generator_without_figures_is_an_error(printed: str) -> None:
    with pytest.raises(load.LoadFailed, match="no figures"):
        load.last_json(printed)


def test_figures_are_in_the_last_line() -> None:
    assert load.last_json('Running 1s test\n{"requests": 5}\n') == {"requests": 5}


# Choices


def chosen(**options: Any) -> Any:
    given = {"quick": False, "rounds": None, "seconds": None, "only": None, "in_flight": None}
    return settings(argparse.Namespace(**{**given, **options}))


def test_only_whole_runs_are_written() -> None:
    assert chosen().is_whole
    assert chosen(quick=True).is_whole
    assert not chosen(only="named").is_whole
    assert not chosen(in_flight=16).is_whole
    assert not chosen(rounds=1).is_whole


def test_only() -> None:
    some = chosen(only="named,streams", in_flight=16)
    assert ([case.name for case in some.cases], some.in_flight, some.streams) == (["named"], (16,), True)
    assert not chosen(only="exact").streams


def test_a_run_fits_its_time() -> None:
    """With half a second beside each measurement, a minute to start, and 2 s beside those of streams."""
    for options, minutes in (({"quick": True}, 3), ({}, 20)):
        plan = chosen(**options)
        requests = (plan.rounds * len(plan.in_flight) * len(plan.cases)) * (plan.seconds + 0.5)
        streams = plan.rounds * 3 * (plan.stream_seconds + plan.burst_seconds + 1 + 1 + 2)
        assert 60 + len(plan.cases) * 1.5 + requests + streams < 60 * minutes


def test_an_unknown_case_is_named() -> None:
    command = [sys.executable, "-m", "bench", "--only", "named,nothing"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "not nothing" in ended.stderr


def test_each_value_takes_its_turn() -> None:
    assert [rotated("abc", by) for by in (0, 1, 3)] == [["a", "b", "c"], ["b", "c", "a"], ["a", "b", "c"]]
    assert rotated("", 2) == []


# Servers


def test_what_is_started_for_a_case(tmp_path: Path) -> None:
    assert [plan.name for plan in servers.plans(tmp_path, {PLAIN})] == [STUB, PLAIN]
    assert [plan.name for plan in servers.plans(tmp_path, {CACHING})] == [STUB, CACHING, TRITON]
    every = servers.plans(tmp_path, {case.server for case in CASES})
    assert [plan.name for plan in every] == [STUB, LITELLM, PLAIN, CACHING, TRITON]


def test_the_gateways_differ_in_their_cache(tmp_path: Path) -> None:
    addresses = {plan.name: plan.address for plan in servers.plans(tmp_path, {PLAIN, CACHING})}
    plain, caching = (load_config(tmp_path / f"{name}.yaml") for name in (PLAIN, CACHING))
    assert (plain.semantic_cache.enabled, caching.semantic_cache.enabled) == (False, True)
    assert {endpoint.url for model in plain.models for endpoint in model.endpoints} == {addresses[STUB]}
    assert plain.model(NAMED) is not None
    assert caching.triton.address == addresses[TRITON]
    assert plain.policy == load_config(ROOT / "config/config.yaml").policy
    assert len({plain.listen.port, caching.listen.port}) == 2


def test_litellm_asks_the_stub_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://somewhere")
    stub, litellm = servers.plans(tmp_path, {LITELLM})
    tree = yaml.safe_load((tmp_path / "litellm.yaml").read_text())
    [model] = tree["model_list"]
    assert (model["model_name"], model["litellm_params"]["api_base"]) == (NAMED, f"{stub.address}/v1")
    assert litellm.environment is not None
    assert "DATABASE_URL" not in litellm.environment
    assert litellm.environment["LITELLM_OFFLINE_MODE"] == "true"
    assert litellm.command[-2:] == ("--num_workers", "1")


def test_a_process_is_counted_with_what_it_started() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True) as shell:
        wait_until("the child", lambda: len(servers.family(shell.pid)) == 2)
        [child] = servers.family(shell.pid) - {shell.pid}
        assert servers.resident_mb(shell.pid) > 0
        for pid in (child, shell.pid):
            os.kill(pid, 15)
    assert servers.family(shell.pid) == {shell.pid}
    assert (servers.resident_mb(shell.pid), servers.cpu_seconds(shell.pid)) == (0.0, 0.0)
    assert servers.cpu_seconds(os.getpid()) > 0


def test_a_server_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('error: no such thing')")
    plan = servers.Plan("broken", command, "", (f"http://127.0.0.1:{free_port()}",))
    words = r"broken ended; its log is .*: error: no such thing"
    with pytest.raises(servers.CannotStart, match=words), servers.running([plan], tmp_path):
        pass


# The stub


@pytest.fixture(scope="module")
def quick_stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("bench") / "stub.log"
    with running([sys.executable, "-m", "bench.stub", str(port)], log):
        url = f"http://127.0.0.1:{port}"
        wait_until("the stub", lambda: answers(f"{url}/health"), 60)
        yield url


def test_the_stub_s_answers_are_whole_and_have_ids_of_their_own(quick_stub: str) -> None:
    with httpx.Client(base_url=quick_stub) as client:
        before = client.get("/").json()["answered"]
        replies = [client.post(load.PATH, content=prompts.body(NAMED, "Why?")) for _ in range(3)]
        assert client.get("/").json()["answered"] == before + 3
    assert all(from_completion(reply.content) for reply in replies)
    assert len({reply.json()["id"] for reply in replies}) == 3
    assert {reply.headers["content-type"] for reply in replies} == {"application/json"}


def test_the_stub_streams_a_whole_answer_of_one_id(quick_stub: str) -> None:
    splitter, assembly, ids = FrameSplitter(), ChunkAssembly(), set()
    with httpx.stream("POST", quick_stub + load.PATH, content=prompts.body(NAMED, "Why?", stream=True)) as reply:
        frames = [data(frame) for piece in reply.iter_bytes() for frame in splitter.feed(piece)]
    for payload in frames:
        assembly.add(payload)
        ids |= {json.loads(payload)["id"]} if payload != b"[DONE]" else set()
    answer = assembly.answer()
    assert answer is not None
    assert answer.message == {"role": "assistant", "content": "The" + " sun" * (EVENTS - 1)}
    assert (len(frames), len(ids)) == (EVENTS + 2, 1)


def test_the_stub_takes_requests_however_they_arrive(quick_stub: str) -> None:
    body = prompts.body(NAMED, "Why?")
    whole = b"POST /v1/chat/completions HTTP/1.1\r\nCONTENT-LENGTH:%d\r\n\r\n%b" % (len(body), body)
    host, _, port = quick_stub.removeprefix("http://").partition(":")
    for pieces in ([whole + whole], [whole[:9], whole[9:60], whole[60:] + whole], [whole, whole]):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            for piece in pieces:
                connection.sendall(piece)
            received = b""
            while len(re.findall(rb"chatcmpl-[0-9a-f]{16}", received)) < 2:
                piece = connection.recv(65_536)
                assert piece, received
                received += piece
        assert received.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize(
    ("buffer", "expected"),
    [
        (b"GET / HTTP/1.1\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 27),
        (b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{", None),
        (b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}POST", 40),
    ],
)
def test_where_a_request_ends(buffer: bytes, expected: int | None) -> None:
    assert request_length(buffer) == expected


# The client of streams


@pytest.fixture
def stream_body(tmp_path: Path) -> Path:
    path = tmp_path / "stream.json"
    path.write_bytes(prompts.body(NAMED, "Why?", stream=True))
    return path


@pytest.mark.parametrize("burst", [True, False])
def test_streams_are_timed(quick_stub: str, stream_body: Path, burst: bool) -> None:
    found = load.streams(quick_stub, stream_body, 4, 1.5, burst=burst)
    assert found["errors"] == 0
    assert found["streams"] >= 4
    assert found["ended"] >= 4
    assert 0 < found["p50_ms"] <= found["p99_ms"] < 5000
    assert found["generator_cores"] > 0


def test_streams_through_the_gateway_are_timed(
    quick_stub: str, stream_body: Path, start_gateway: StartGateway, stub_triton: Tree
) -> None:
    policy = {"rules": [], "default": NAMED}
    changes = {
        "triton": stub_triton,
        "models": models(quick_stub),
        "semantic_cache": {"enabled": False},
        "policy": policy,
    }
    gateway = start_gateway(changes)
    before = probe.outcomes(probe.ask("GET", f"{gateway.url}/metrics"))
    found = load.streams(gateway.url, stream_body, 4, 1.0, burst=True)
    after = probe.outcomes(probe.ask("GET", f"{gateway.url}/metrics"))
    assert found["errors"] == 0
    assert found["ended"] == found["streams"] >= 4
    assert probe.share(before, after, "bypass") == 1.0


@pytest.mark.parametrize("fault", ["status-500", "break"])
def test_broken_streams_are_errors(stub: Server, stream_body: Path, fault: str) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": fault})
    try:
        assert load.streams(stub.url, stream_body, 2, 0.5, burst=True)["errors"] == 2
    finally:
        httpx.post(f"{stub.url}/stub", json={"fault": "none"})


def test_calls_of_triton_are_timed(stub_triton: Tree, tmp_path: Path) -> None:
    texts = load.lines(tmp_path / "texts.txt", [text.encode() for text in islice(prompts.new_texts(4), 20_000)])
    found = load.triton_calls(stub_triton["address"], texts, 4, 1)
    assert (found.errors, found.seconds) == (0, 1)
    assert found.requests > 4
    assert 0 < found.p50_ms <= found.p99_ms < 1000
    assert found.cpu_seconds > 0


def test_calls_that_fail_are_errors(tmp_path: Path) -> None:
    texts = load.lines(tmp_path / "texts.txt", [b"one", b"two"])
    assert load.triton_calls(f"127.0.0.1:{free_port()}", texts, 2, 1).errors == 2


def test_an_answer_with_another_status_is_unexpected(stub: Server) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": "status-503"})
    try:
        with pytest.raises(probe.Unexpected, match="status 503"):
            probe.ask("POST", stub.url + load.PATH, prompts.body(NAMED, "Why?"))
    finally:
        httpx.post(f"{stub.url}/stub", json={"fault": "none"})
    with pytest.raises(probe.Unexpected):
        probe.ask("GET", f"http://127.0.0.1:{free_port()}/")


def test_the_documentation_has_the_commands_that_there_are() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert set(re.findall(r"^\| `([a-z]+)` \|", text, re.MULTILINE)) >= {case.name for case in CASES}
