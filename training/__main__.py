"""`python -m training COMMAND`: what the Makefile's train, evaluate, base, calibrate, label and weights run."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from training.corpus import PROMPTS
from training.pairs import PAIRS
from training.weights import MODELS, missing

WINDOW, WINDOWS = 258, 4  # tokens read at a time, two of them marks, and how many times: 1,024 of a prompt
REPOSITORY = Path("model_repository")
PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime", "sklearn")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 cannot, 2 the data or the arguments are wrong."""
    options = _parser().parse_args(arguments)
    if options.command is _weights and not (absent := missing(options.out)):
        print(f"{options.out}: all weights are there")
        return 0
    if options.command is _weights:
        print(*(f"{options.out / model / 'weights'} is missing" for model in absent), sep="\n")
    if lacking := [name for name in PACKAGES if not find_spec(name)]:
        return _fail(f"training needs {', '.join(lacking)}: pip install 'fingerpost[train]'", 1)
    return _guarded(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=run)
        if run not in (_base, _benchmarks):
            added.add_argument(
                "--out", type=Path, default=REPOSITORY, help="the model repository (default: %(default)s)"
            )
        return added.add_argument

    add = command("train", _train, "train, measure and export the heads")
    add("--data", nargs="+", default=[str(PROMPTS)], help="files, folders or Hub data sets (default: our own prompts)")
    add("--base", default="small", help="small, a folder, or a hub id such as answerdotai/ModernBERT-base")
    add("--start", choices=("base", "shipped"), help="from untrained or from the shipped heads (default: with --data)")
    add("--epochs", type=_positive, default=4, help="at most; training stops early when it no longer helps")
    add("--seed", type=int, default=0)
    add("--window", type=_window, default=WINDOW, help="tokens that are read at a time (default: %(default)s)")
    add("--windows", type=_positive, default=WINDOWS, help="windows read of a prompt (default: %(default)s)")
    add = command("train-verifier", _train_verifier, "train, measure and export the verifier of near misses")
    add("--data", nargs="+", type=Path, default=[PAIRS], help="files or folders of groups (default: our own)")
    add("--base", default="small", help="small, a folder, or a hub id such as answerdotai/ModernBERT-base")
    add("--epochs", type=_count, default=3, help="0: only fit the thresholds anew, to the one of --start")
    add("--seed", type=int, default=0)
    add("--start", type=Path, help="a verifier to train further, such as training/shipped/verifier")
    add = command("evaluate-verifier", _evaluate_verifier, "measure the exported verifier and write a report")
    add("--data", nargs="+", type=Path, default=[PAIRS], help="files or folders of groups (default: our own)")
    add("--public", type=Path, help="folder with qqp_pairs.jsonl.gz and stsb_test.jsonl.gz, measured, too")
    command("weights", _weights, "export what the model repository lacks, from what is shipped")
    add = command("evaluate", _evaluate, "measure the exported classifier on the test rows and write a report")
    add("--data", nargs="+", default=[str(PROMPTS)], help="rows as for train; baselines learn from the training rows")
    add = command("base", _base, "build the small base anew")
    add("--text", type=Path, help="folder of .txt, .md and .jsonl files to distil on, too")
    add("--steps", type=_count, default=1000, help="batches of 2,048 tokens, about 1.6 s each on two cores")
    add("--seed", type=int, default=0)
    add("--start", type=Path, help="a base to distil further (default: transplant the teacher)")
    add("--to", type=Path, default=Path("weights/base"), help="folder to write (default: %(default)s)")
    add = command("calibrate", _calibrate, "place a model on the scale of abilities from graded answers")
    add("--model", required=True, help="the name that the configuration's models give as ability")
    add(
        "--data",
        nargs="+",
        required=True,
        help="rows with text and correct: {model: 1 or 0}, or a column correct.MODEL",
    )
    add = command("label", _label, "propose labels for unlabelled prompts, the least certain first")
    add("--prompts", type=Path, required=True, help="a text file, a prompt a line, or JSONL with a field text")
    add("--to", type=Path, default=Path("labelled.jsonl"), help="file to write (default: %(default)s)")
    add = command("benchmarks", _benchmarks, "turn MMLU-Pro and RouteLLM's tables into rows")
    add("--data", type=Path, required=True, help="folder with mmlu_pro.jsonl.gz and routellm_mmlu.jsonl.gz")
    add("--to", type=Path, default=Path("weights/benchmarks.jsonl"), help="file to write (default: %(default)s)")
    return parser


def _train(options: argparse.Namespace) -> None:
    from training.train import Settings, train

    bare = options.data == [str(PROMPTS)] or options.base != "small"
    settings = Settings(
        data=tuple(options.data),
        base=options.base,
        start=options.start or ("base" if bare else "shipped"),
        repository=options.out,
        epochs=options.epochs,
        seed=options.seed,
        window=options.window,
        windows=options.windows,
    )
    train(settings)
    _export_embedder(options.out)


def _weights(options: argparse.Namespace) -> None:
    from training.base import load_base
    from training.heads import SHIPPED, load_heads
    from training.publish import publish

    if "classifier" in missing(options.out):
        base = load_base("small")
        trained = load_heads(SHIPPED, base)
        print(f"exporting the shipped heads to {options.out / 'classifier' / 'weights'}")
        publish(trained, base, options.out, trained.facts["precision"])
    if "verifier" in missing(options.out):
        from training.verifier import SHIPPED as SHIPPED_VERIFIER
        from training.verifier import load_verifier
        from training.verify import publish_verifier

        print(f"exporting the shipped verifier to {options.out / 'verifier' / 'weights'}")
        base = load_base("small")
        publish_verifier(load_verifier(SHIPPED_VERIFIER, base), base, options.out)
    _export_embedder(options.out)


def _train_verifier(options: argparse.Namespace) -> None:
    from training.verify import Settings, train_verifier

    train_verifier(
        Settings(tuple(options.data), options.base, options.out, options.epochs, options.seed, options.start)
    )


def _evaluate_verifier(options: argparse.Namespace) -> None:
    from training.verify import report_verifier

    report_verifier(options.out, options.data, options.public)


def _export_embedder(repository: Path) -> None:
    if MODELS[0] in missing(repository):
        from training.export import export_embedder

        print(f"exporting {repository / 'embedder' / 'weights'}, fingerprint {export_embedder(repository)}")


def _evaluate(options: argparse.Namespace) -> None:
    from training.train import report

    report(options.out, options.data)


def _base(options: argparse.Namespace) -> None:
    from training.small import build_small

    manifest = build_small(options.text, options.steps, options.seed, options.to, options.start)
    for name, cosine in manifest["held_out_cosine"].items():
        print(f"cosine to the teacher on held-out text, {name}: {cosine:.4f}")
    print(f"base: {options.to}; train on it with BASE={options.to}")


def _calibrate(options: argparse.Namespace) -> None:
    from training.placement import place

    place(options.out / "classifier" / "weights", options.model, options.data)


def _label(options: argparse.Namespace) -> None:
    from training.label import label

    label(options.out / "classifier" / "weights", options.prompts, options.to)


def _benchmarks(options: argparse.Namespace) -> None:
    from training.benchmarks import write_benchmarks

    print(f"{options.to}: {write_benchmarks(options.data, options.to)} rows")


def _guarded(options: argparse.Namespace) -> int:
    """Run the command; what a user can mend becomes a message and a status."""
    _quiet()
    import torch

    from training.base import BaseError
    from training.export import ParityError
    from training.heads import ForeignBase
    from training.placement import TooFewGrades
    from training.rows import BadRows
    from training.served import NoWeights
    from training.small import ForeignTeacher

    # So that half-built folders are removed.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        options.command(options)
    except BadRows as error:
        return _fail(f"{error}\nnothing was done (problems: {len(error.problems)})", 2)
    except (BaseError, ForeignBase, ForeignTeacher, ParityError, NoWeights, TooFewGrades, FileNotFoundError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (found := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return found

    return number


_count, _positive, _window = _at_least(0), _at_least(1), _at_least(8)


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _quiet() -> None:
    """Keep the libraries' own progress bars and notices out of ours."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors.*")  # data that grades no model
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
