"""`python -m bench.scale`: the semantic cache with 1,000, 100,000 and 1,000,000 entries, on Milvus and in memory.

On Milvus each size twice, without partitions and with 64 by scope, each on a server of its own. What was measured is
in bench/results/scale.md and scale.json after each step: a run that is ended early leaves what it has, one with `--add`
keeps what others have measured and this one does not measure again. docs/scale.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from bench.__main__ import commit, machine
from bench.scale import in_memory, on_milvus, report
from bench.scale.lookups import apart
from bench.servers import CannotStart

SIZES = (1_000, 100_000, 1_000_000)
MEMORY_SIZES = (1_000, 10_000, 100_000, 300_000, 1_000_000, 2_000_000)
VARIANTS = {"plain": None, "partitions": on_milvus.PARTITIONS}
PACKAGES = ("milvus", "pymilvus", "numpy", "orjson")
RESULTS = Path("bench/results/scale")
BYTES_PER_ENTRY = 8000  # that the memory backend may take, and a piece that is being made


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", metavar="ENTRIES", help="of both backends")
    parser.add_argument("--backend", choices=("milvus", "memory", "both"), default="both")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="of Milvus")
    parser.add_argument("--scopes", type=int, metavar="N", help="in which the entries are (a 64th of the entries)")
    parser.add_argument("--queries", type=int, default=500, metavar="N", help="lookups of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"without its suffix ({RESULTS})")
    parser.add_argument("--add", action="store_true", help="to what is there already")
    options = parser.parse_args()
    before = options.out.with_suffix(".json")
    run = report.read(before.read_bytes()) if options.add and before.exists() else report.Run()
    run = replace(run, runs=(*run.runs, about()))
    try:
        for grown in growing(run, options):
            run = grown
            write(run, options.out)
    except CannotStart as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        print(report.as_markdown(run))
    return 0


def growing(run: report.Run, options: argparse.Namespace) -> Iterator[report.Run]:
    """The run with one figure more each time."""
    if options.backend != "memory":
        for size in options.sizes or SIZES:
            for name in options.variants:
                say(f"Milvus, {size:,} entries, {name}")
                for found in on_milvus.measured(size, options.scopes, options.queries, VARIANTS[name], say):
                    run = run.with_milvus(found)
                    yield run
    if options.backend != "milvus":
        for result in in_memory_until_slow(options.sizes or MEMORY_SIZES, options.scopes, options.queries):
            run = run.with_memory(result)
            yield run


def in_memory_until_slow(sizes: Sequence[int], scopes: int | None, queries: int) -> Iterator[in_memory.Result]:
    """Until one search takes too long or this machine's memory ends."""
    for size in sizes:
        if (free := available_bytes()) < BYTES_PER_ENTRY * size:
            say(f"in memory, {size:,} entries: {free / 1e9:.1f} GB are free, too little")
            return
        found: in_memory.Result = apart(in_memory.measured, size, scopes, queries)
        times = found.searches["largest"]
        say(f"in memory, {size:,} entries: search in the largest scope {times.p50_ms:.2f} ms")
        yield found
        if times.p50_ms > in_memory.SLOW_MS:
            return


def available_bytes() -> int:
    """Of memory, without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def about() -> dict[str, str]:
    command = shlex.join(["python", "-m", "bench.scale", *sys.argv[1:]])
    return {
        "run": f"`{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
        **machine(),
        "load average before": f"{os.getloadavg()[0]:.2f}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def write(run: report.Run, base: Path) -> None:
    base.parent.mkdir(parents=True, exist_ok=True)
    base.with_suffix(".json").write_text(report.as_json(run))
    base.with_suffix(".md").write_text(report.as_markdown(run))


def say(line: str) -> None:
    tqdm.write(f"bench: {datetime.now(UTC):%H:%M:%S} {line}", file=sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
