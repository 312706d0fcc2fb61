"""`python -m bench [--quick]`: the gateway beside the stub upstream alone, LiteLLM and Triton, all in one run.

Everything that is compared is measured in turns: each round goes through all cases, each time in another order.
`--only named,exact --in-flight 16` measures less, prints it and writes nothing; see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

from bench import load, probe, prompts, report
from bench.cases import CASES, IN_FLIGHT, NAMED, STREAM_SERVERS, STREAMS, STREAMS_NAME, STUB, TRITON, Case
from bench.figures import Sample, StreamSample
from bench.servers import BIN, CannotStart, Server, emptied, plans, running

FOLDER = Path("data/bench")  # configurations, logs, bodies
RESULTS = Path("bench/results")
MOST_PER_SECOND = 2000  # more than Triton reads: so many new texts are made for a second
SETTLE_SECONDS = 0.3  # for what a load generator left unanswered when its time was over
WARM_IN_FLIGHT = 16
PACKAGES = ("starlette", "uvicorn", "uvloop", "aiohttp", "httptools", "orjson", "tritonclient")


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    kind: str
    rounds: int
    seconds: int  # of each measurement by wrk, which knows whole ones only
    stream_seconds: float
    burst_seconds: float
    cases: tuple[Case, ...]
    in_flight: tuple[int, ...]
    streams: bool
    is_whole: bool  # nothing is left out: the results are written


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*(case.name for case in CASES), STREAMS_NAME]
    parser.add_argument("--quick", action="store_true", help="two rounds of one second: under three minutes, and rough")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=int, help="of each measurement")
    parser.add_argument("--only", metavar="CASE,...", help=f"some of {', '.join(names)}")
    parser.add_argument("--in-flight", type=int, choices=IN_FLIGHT)
    options = parser.parse_args()
    if unknown := set((options.only or "").split(",")) - {*names, ""}:
        parser.error(f"--only takes {', '.join(names)}, not {', '.join(sorted(unknown))}")
    try:
        run = measured(settings(options))
    except (CannotStart, load.LoadFailed, probe.Unexpected) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 1 if report.problems(run) else 0


def settings(options: argparse.Namespace) -> Settings:
    only = set(options.only.split(",")) if options.only else {STREAMS_NAME, *(case.name for case in CASES)}
    is_quick: bool = options.quick
    return Settings(
        kind="quick" if is_quick else "full",
        rounds=options.rounds or (2 if is_quick else 5),
        seconds=options.seconds or (1 if is_quick else 5),
        stream_seconds=2.0 if is_quick else 8.0,
        burst_seconds=0.5 if is_quick else 3.0,
        cases=tuple(case for case in CASES if case.name in only),
        in_flight=(options.in_flight,) if options.in_flight else IN_FLIGHT,
        streams=STREAMS_NAME in only,
        is_whole=not (options.only or options.in_flight or options.rounds or options.seconds),
    )


def measured(chosen: Settings) -> report.Run:
    """Start the servers, measure, end them, tell. What goes wrong is raised."""
    folder = emptied(FOLDER)
    wanted = {case.server for case in chosen.cases} | (set(STREAM_SERVERS) if chosen.streams else set())
    described = {**machine(), "load average before": f"{os.getloadavg()[0]:.2f}"}
    started = plans(folder, wanted)
    say(f"starting {', '.join(plan.name for plan in started)}; logs and configurations are in {folder}/")
    with running(started, folder) as servers:
        for server in servers.values():
            say(f"{server.plan.name} is process {server.process.pid}, {server.address}")
        bench = Bench(chosen, servers, folder)
        bench.warm()
        for number in range(chosen.rounds):
            bench.take_round(number)
    run = report.Run(
        words(chosen), described, versions(), tuple(bench.samples), tuple(bench.streams), bench.resident_mb
    )
    if chosen.is_whole:
        write(run, RESULTS / chosen.kind)
    print(report.as_markdown(run))
    return run


class Bench:
    """The measurements of one run."""

    def __init__(self, chosen: Settings, servers: dict[str, Server], folder: Path) -> None:
        self._chosen = chosen
        self._servers = servers
        self._folder = folder
        self._new, self._wordings = prompts.new_texts(seed=4), prompts.wordings()
        self.samples: list[Sample] = []
        self.streams: list[StreamSample] = []
        self.resident_mb: dict[str, float] = {}

    def warm(self) -> None:
        """Once through all cases, unrecorded: connections, caches and code are then as they will be."""
        for case in self._chosen.cases:
            self._measure(case, WARM_IN_FLIGHT, 0, seconds=1)

    def take_round(self, number: int) -> None:
        for in_flight in self._chosen.in_flight:
            for case in rotated(self._chosen.cases, number):
                sample = self._measure(case, in_flight, number, self._chosen.seconds)
                self.samples.append(sample)
                rate, times = f"{sample.per_second:,.0f}/s", f"p50 {sample.p50_ms:.2f} ms, p99 {sample.p99_ms:.2f} ms"
                say(f"round {number + 1}/{self._chosen.rounds}: {case.words}, {in_flight} in flight: {rate}, {times}")
        if self._chosen.streams:
            for name in rotated(tuple(STREAM_SERVERS), number):
                for kind in report.KINDS:
                    self._stream(name, kind, number)
        for name, server in self._servers.items():
            self.resident_mb[name] = max(self.resident_mb.get(name, 0.0), server.resident_mb())

    def _measure(self, case: Case, in_flight: int, number: int, seconds: int) -> Sample:
        server = self._servers[case.server]
        asked, headers = self._asked(case, seconds), {}
        if case.texts == "wordings":
            headers["x-fingerpost-cache-control"] = "no-store"  # one that should miss does so again, and shows
        self._prime(case, server)
        before, used = self._seen(case), server.cpu_seconds()
        if case.server == TRITON:
            found = load.triton_calls(server.address, asked, in_flight, seconds)
        else:
            found = load.wrk(server.address, asked, in_flight, seconds, headers)
        used = server.cpu_seconds() - used
        right = self._right(case, before, found.requests)
        time.sleep(SETTLE_SECONDS)
        return Sample(
            case=case.name,
            in_flight=in_flight,
            round=number,
            requests=found.requests,
            seconds=found.seconds,
            p50_ms=found.p50_ms,
            p99_ms=found.p99_ms,
            errors=found.errors,
            right=right,
            server_cpu_seconds=used,
            generator_cpu_seconds=found.cpu_seconds,
        )

    def _stream(self, name: str, kind: str, number: int) -> None:
        body = self._folder / "stream.json"
        body.write_bytes(prompts.body(NAMED, prompts.PAIRS[0][0], stream=True))
        burst = kind == "burst"
        seconds = self._chosen.burst_seconds if burst else self._chosen.stream_seconds
        found = load.streams(self._servers[name].address, body, STREAMS, seconds, burst=burst)
        figures = {key: found[key] for key in ("streams", "p50_ms", "p99_ms", "errors", "generator_cores")}
        sample = StreamSample(server=name, kind=kind, round=number, **figures)
        self.streams.append(sample)
        words = f"first token p50 {sample.p50_ms:.2f} ms, p99 {sample.p99_ms:.2f} ms"
        what = f"streams of {STREAM_SERVERS[name]}, {report.KINDS[kind]}"
        say(f"round {number + 1}/{self._chosen.rounds}: {what}: {words}")
        time.sleep(SETTLE_SECONDS)

    def _asked(self, case: Case, seconds: int) -> Path:
        """The file of what is asked: texts for Triton, bodies for all others."""
        texts = list(islice(self._texts(case), seconds * MOST_PER_SECOND if case.texts != "one" else 1))
        if case.server == TRITON:
            return load.lines(self._folder / "texts.txt", [text.encode() for text in texts])
        return load.lines(self._folder / "bodies.jsonl", prompts.bodies(case.model, texts))

    def _texts(self, case: Case) -> Iterator[str]:
        if case.texts == "new":
            return self._new
        return self._wordings if case.texts == "wordings" else iter([prompts.PAIRS[0][0]])

    @staticmethod
    def _prime(case: Case, server: Server) -> None:
        """Have what hits are to find in the cache: misses in between may have pushed it out."""
        if case.outcome in ("hit-exact", "hit-semantic"):
            for question, _ in prompts.PAIRS:
                probe.complete(server, prompts.body(case.model, question))

    def _seen(self, case: Case) -> dict[str, float]:
        """What has been answered so far, by the gateway's cache or else by the stub."""
        if case.outcome is not None:
            return probe.outcomes(probe.ask("GET", f"{self._servers[case.server].address}/metrics"))
        return {"stub": probe.answered(self._servers[STUB])}

    def _right(self, case: Case, before: dict[str, float], requests: int) -> float:
        """The share of the answers that came the way that the case is about."""
        after = self._seen(case)
        if case.outcome is not None:
            return probe.share(before, after, case.outcome)
        if case.server == TRITON or not requests:
            return 1.0
        return min(1.0, (after["stub"] - before["stub"]) / requests)


def rotated(values: Sequence[T], by: int) -> list[T]:
    """Each value takes its turn at being first."""
    first = by % len(values) if values else 0
    return [*values[first:], *values[:first]]


def words(chosen: Settings) -> dict[str, str]:
    return {
        "run": f"{chosen.kind}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "rounds": f"{chosen.rounds}, of {chosen.seconds} s for each case at each number of requests in flight",
        "commit": commit(),
    }


def commit() -> str:
    """The checked out commit, and whether what runs differs from it."""
    short = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "gateway", "bench", "config"], capture_output=True, text=True, check=False
    )
    sources = [line for line in changed.stdout.splitlines() if "bench/results/" not in line]
    return f"{short.stdout.strip() or 'unknown'}{', with changes' if sources else ''}"


def machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "machine": f"{os.cpu_count()} cores ({model}), {memory:.0f} GB",
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
    }


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    litellm = next(BIN.parent.glob("lib/python*/site-packages/litellm-*.dist-info"), None)
    found["litellm"] = litellm.name.removeprefix("litellm-").removesuffix(".dist-info") if litellm else "not installed"
    found["wrk"] = "not installed"
    if (BIN / "wrk").exists():
        wrk = subprocess.run([str(BIN / "wrk"), "-v"], capture_output=True, text=True, check=False)  # its status is 1
        found["wrk"] = wrk.stdout.partition("[")[0].removeprefix("wrk").strip()
    return found


def write(run: report.Run, base: Path) -> None:
    base.parent.mkdir(parents=True, exist_ok=True)
    base.with_suffix(".json").write_text(json.dumps(report.as_json(run), indent=1) + "\n")
    base.with_suffix(".md").write_text(report.as_markdown(run))


def say(line: str) -> None:
    print(f"bench: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
