"""`python -m bench.cache [--quick]`: labelled questions through the semantic cache, static thresholds and GPTCache.

All on the same embeddings, in one run, in turns: docs/benchmarks.md. A whole run writes bench/results/cache.md and
cache.png, `--quick` cache-quick.md and cache-quick.png, anything else into data/bench-cache.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from threadpoolctl import threadpool_limits

from bench.__main__ import machine
from bench.cache import plots, report
from bench.cache.embeddings import Embedder
from bench.cache.held_out import held_out
from bench.cache.replay import Found, played
from bench.cache.streams import SEED, dice, missing, replays
from bench.cache.system import CannotRun
from bench.cache.systems import SYSTEMS

DATA = Path("../shared/data")
RESULTS, PARTS = Path("bench/results"), Path("data/bench-cache")
QUICK_REQUESTS = 400
EMBEDDED_ALONE = 200  # texts whose embedding is timed
PACKAGES = ("numpy", "onnxruntime", "scipy")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS} requests of each: under two minutes")
    parser.add_argument("--requests", type=int, metavar="N", help="at most so many of each set of questions")
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of the public questions ({DATA})")
    parser.add_argument("--systems", metavar="NAME,...", help=f"some of {', '.join(SYSTEMS)}")
    options = parser.parse_args()
    chosen = options.systems.split(",") if options.systems else list(SYSTEMS)
    if unknown := set(chosen) - SYSTEMS.keys():
        parser.error(f"--systems takes {', '.join(SYSTEMS)}, not {', '.join(sorted(unknown))}")
    if options.requests is not None and options.requests < 2:
        parser.error("--requests takes 2 or more")
    try:
        with threadpool_limits(1):
            run = measured(options.data, chosen, options.requests or (QUICK_REQUESTS if options.quick else None))
    except CannotRun as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    is_whole = not (options.requests or options.systems or missing(options.data))
    base = (RESULTS if is_whole else PARTS) / ("cache-quick" if options.quick else "cache")
    write(run, base)
    return 1 if report.doubts(run) else 0


def measured(data: Path, chosen: list[str], requests: int | None) -> report.Run:
    """Raises CannotRun."""
    load = f"{os.getloadavg()[0]:.2f}"
    embedder = Embedder()
    makers = {name: SYSTEMS[name] for name in SYSTEMS if name in chosen}
    found, texts = [], []
    for replay in replays(data, held_out(), requests):
        embedded = embedder.embedded((turn.text for turn in replay.turns), replay.name)
        found.append(played(replay, embedded, makers))
        texts += embedded.texts
    if not found:
        raise CannotRun(f"no questions in {data}, and no pairs of the project's own")
    alone = dice().sample(texts, min(EMBEDDED_ALONE, len(texts)))
    notes = [f"{name} is not in {data}: left out" for name in missing(data)]
    return report.Run(about(embedder, found, load), tuple(found), embedder.seconds(alone), tuple(notes))


def about(embedder: Embedder, found: list[Found], load: str) -> dict[str, str]:
    installed = {name: version(name) for name in PACKAGES}
    for result in found[0].results.values():
        installed |= result.versions
    command = shlex.join(["python", "-m", "bench.cache", *sys.argv[1:]])
    return {
        "run": f"`{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, seed {SEED}",
        **machine(),
        "load average before": load,
        "embedder": embedder.words,
        "versions": ", ".join(f"{name} {number}" for name, number in installed.items()),
    }


def write(run: report.Run, base: Path) -> None:
    base.parent.mkdir(parents=True, exist_ok=True)
    plots.draw(base.with_suffix(".png"), [view for found in run.found for view in report.views(found)])
    text = report.as_markdown(run, base.with_suffix(".png").name)
    base.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"bench: written to {base}.md and {base}.png")


if __name__ == "__main__":
    sys.exit(main())
