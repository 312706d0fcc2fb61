"""Times Triton's `router` itself: `python -m bench.calls ADDRESS TEXTS_FILE --in-flight 16 --seconds 5`.

With the gateway's own client library and loop, and without reading what comes back, so that a routed miss is compared
with the least that a call can take. Each line of the file is a text; none is sent twice. Prints its figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from bench.figures import percentile


@dataclass(slots=True)
class Tally:
    taken_ms: list[float] = field(default_factory=list)
    errors: int = 0


async def call(client: InferenceServerClient, texts: Iterator[str], until: float, tally: Tally) -> None:
    """One call after the other, until one fails; what is not back in time does not count."""
    for text in texts:
        given = InferInput("text", [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
        started = time.perf_counter()
        try:
            await client.infer("router", [given])
        except InferenceServerException:
            tally.errors += 1
            return
        if (now := time.perf_counter()) > until:
            return
        tally.taken_ms.append(1000 * (now - started))


async def measure(address: str, texts: list[str], in_flight: int, seconds: float) -> Tally:
    tally, shared, until = Tally(), iter(texts), time.perf_counter() + seconds
    async with InferenceServerClient(address) as client:
        await asyncio.gather(*(call(client, shared, until, tally) for _ in range(in_flight)))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    used = time.process_time()
    texts = options.texts.read_text().splitlines()
    tally = uvloop.run(measure(options.address, texts, options.in_flight, options.seconds))
    figures = {
        "requests": len(tally.taken_ms),
        "seconds": options.seconds,
        "p50_ms": percentile(tally.taken_ms, 0.5),
        "p99_ms": percentile(tally.taken_ms, 0.99),
        "errors": tally.errors,
        "cpu_seconds": time.process_time() - used,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
