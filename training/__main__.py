"""`python -m training`: fine-tune, measure and export; `--missing` builds only what `model_repository` lacks."""

import argparse
import os
import signal
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from training.weights import missing


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 cannot, 2 the data or the arguments are wrong."""
    options = _parser().parse_args(arguments)
    absent = missing(options.out)
    for model in absent:
        print(f"{options.out / model / 'weights'} is missing")
    if options.missing and not absent:
        print(f"{options.out}: all weights are there")
        return 0
    if absent_packages := [name for name in ("torch", "transformers", "peft", "onnx") if not find_spec(name)]:
        return _fail(f"training needs {', '.join(absent_packages)}: pip install 'fingerpost[train]'", 1)
    return _build(options, embedder="embedder" in absent, classifier=not options.missing or "classifier" in absent)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="JSONL file, or a folder of them (default: the project's own prompts)")
    add("--base", default="small", help="small, a folder, or a hub id such as answerdotai/ModernBERT-base")
    add("--out", type=Path, default=Path("model_repository"), help="the model repository to write weights to")
    add("--epochs", type=_positive, default=4)
    add("--seed", type=int, default=0)
    add("--max-tokens", type=_positive, default=256, help="longer prompts are cut, in training and in serving")
    add("--distil-steps", type=int, default=0, help="batches of 1,024 tokens to distil the small base for")
    add("--missing", action="store_true", help="do nothing when the weights are there")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _build(options: argparse.Namespace, embedder: bool, classifier: bool) -> int:
    _quiet()
    import torch

    from training.base import PROMPTS, BaseError
    from training.export import ParityError, export_embedder
    from training.rows import BadRows
    from training.train import Settings, train

    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that half-built folders are removed
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = Settings(
        data=options.data or PROMPTS,
        base=options.base,
        repository=options.out,
        epochs=options.epochs,
        seed=options.seed,
        max_tokens=options.max_tokens,
        distil_steps=options.distil_steps,
    )
    try:
        if classifier:  # first, because it may find fault with the data
            run = train(settings)
            print(f"exported {options.out / 'classifier' / 'weights'}; figures in {run / 'metrics.json'}")
        if embedder:
            print(f"exported {options.out / 'embedder' / 'weights'}, fingerprint {export_embedder(options.out)}")
    except BadRows as error:
        return _fail(f"{error}\nnothing was trained (problems: {len(error.problems)})", 2)
    except (BaseError, ParityError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _quiet() -> None:
    """Keep the libraries' own progress bars and notices out of ours."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
