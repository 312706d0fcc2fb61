"""How long one text takes through `router` in Triton: `.venv/bin/python -m bench.router [--address 127.0.0.1:8001]`.

Needs a running Triton (`make serve` or `python -m deploy.local.triton`). Texts of each length are sent one at a time,
the lengths in turn, so that whatever else the machine does touches all of them alike.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tritonclient.grpc import InferenceServerClient, InferInput

TOKENIZER = Path("model_repository/classifier/weights/tokenizer.json")
LENGTHS = (16, 32, 128, 512, 2048)  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:8001")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    client = InferenceServerClient(options.address)
    texts = {length: text_of(length) for length in LENGTHS}
    for text in texts.values():
        ask(client, text)
    times: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for number in range(options.rounds):
        for length in LENGTHS[: 3 if number % 10 else None]:  # the long ones in every tenth round
            start = time.perf_counter()
            ask(client, texts[length])
            times[length].append(1000 * (time.perf_counter() - start))
    print("tokens  requests  p50 ms  p95 ms")
    for length, taken in times.items():
        ordered = sorted(taken)
        p95 = ordered[int(0.95 * (len(ordered) - 1))]
        print(f"{length:6}  {len(taken):8}  {statistics.median(taken):6.1f}  {p95:6.1f}")


def text_of(length: int) -> str:
    """A text of `length` tokens, special tokens included."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    question = tokenizer.encode("which of the two older towns by the river has the better harbour and why").ids[1:-1]
    return tokenizer.decode([question[i % len(question)] for i in range(length - 2)])


def ask(client: InferenceServerClient, text: str) -> None:
    given = InferInput("text", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
    client.infer("router", [given])


if __name__ == "__main__":
    main()
