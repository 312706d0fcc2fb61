"""From trained heads to the weights Triton serves, and the choice of the precision they are served in."""

import copy
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from training.base import Base
from training.compute import device
from training.export import PRECISIONS, convert, export, milliseconds, outliers, samples
from training.heads import Trained
from training.measures import Export, auc
from training.model import Router, merged
from training.rows import Row
from training.served import Readings, Served

T = TypeVar("T")
OUTPUTS = ["category", "complexity", "difficulty"]
KEPT = 0.005  # accuracy that a smaller form may cost
CHOSEN_BY = 3000  # validation rows: of 1,000 half a point is a coin
SAMPLE = 1000  # test rows that each form is shown on
TIMED = (16, 32, 128)  # tokens


def publish(trained: Trained, base: Base, repository: Path, precision: str) -> str:
    """Export `trained` to `classifier` in `repository`; return the fingerprint. Raises ParityError.

    `precision` is for a CPU; where there is a GPU, it is float16.
    """
    precision = "float16" if device().type == "cuda" else precision
    manifest = {"base": base.name, **trained.manifest(), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    return export(for_export(trained.router), OUTPUTS, base.tokenizer, repository / "classifier", manifest, precision)


def for_export(router: Router) -> Router:
    """A copy of `router` on the CPU with the low-rank updates merged into the weights."""
    whole = copy.deepcopy(router).cpu()
    whole.classifier = merged(whole.classifier)
    return whole.eval()


def measured_precisions(
    trained: Trained, base: Base, validation: Sequence[Row], test: Sequence[Row]
) -> tuple[str, list[Export]]:
    """The precision to serve on a CPU, and the figures of all of them on `test`.

    Chosen on `validation`: int8 when it costs no more than KEPT of the float32 accuracy of category and AUCs of
    complexity and of the models' predicted quality, else float32.
    """
    with TemporaryDirectory() as scratch:
        export(for_export(trained.router), OUTPUTS, base.tokenizer, Path(scratch, "classifier"), trained.manifest())
        folder = Path(scratch, "classifier", "weights")
        forms = {name: folder / f"{name}.onnx" for name in PRECISIONS}
        kept = outliers(folder / "model.onnx", samples(base.tokenizer))
        for name, path in forms.items():
            convert(folder / "model.onnx", path, name, kept)
        rows = sample(validation, CHOSEN_BY)
        chosen_by = {name: accuracies(Served(folder, forms[name]), rows) for name in ("float32", "int8")}
        pairs = zip(chosen_by["float32"], chosen_by["int8"], strict=True)
        loses = [a - b for a, b in pairs if a is not None and b is not None]
        chosen = "int8" if all(loss <= KEPT for loss in loses) else "float32"
        return chosen, [form_figures(name, Served(folder, path), path, test) for name, path in forms.items()]


def accuracies(served: Served, rows: Sequence[Row]) -> tuple[float | None, float | None, float | None]:
    """Accuracy of the category, AUC of complexity and of quality on `rows`; None where no row says."""
    found = served.read([row.text for row in rows])
    return category_accuracy(served.labels, rows, found), complexity_auc(rows, found), quality_auc(served, rows, found)


def category_accuracy(labels: Sequence[str], rows: Sequence[Row], found: Readings) -> float | None:
    right = [labels[i] == row.category for row, i in zip(rows, found.category.argmax(1), strict=True) if row.category]
    return float(np.mean(right)) if right else None


def complexity_auc(rows: Sequence[Row], found: Readings) -> float | None:
    known = [
        (row.complexity >= 0.5, p) for row, p in zip(rows, found.complexity, strict=True) if row.complexity is not None
    ]
    return auc(*map(np.array, zip(*known, strict=True))) if known else None


def quality_auc(served: Served, rows: Sequence[Row], found: Readings) -> float | None:
    """AUC of "this model gets this prompt right" over all grades of `rows`."""
    known: list[tuple[bool, float]] = []
    for model in served.manifest["abilities"]:
        graded = [i for i, row in enumerate(rows) if model in row.correct]
        right = served.right(model, found.difficulty[graded]) if graded else ()
        known += [(rows[i].correct[model] >= 0.5, p) for i, p in zip(graded, right, strict=True)]
    return auc(*map(np.array, zip(*known, strict=True))) if known else None


def sample(rows: Sequence[T], most: int) -> list[T]:
    """Up to `most` of `rows`, spread evenly over them."""
    step = max(len(rows) / most, 1)
    return [rows[int(i * step)] for i in range(min(len(rows), most))]


def form_figures(name: str, served: Served, path: Path, rows: Sequence[Row]) -> Export:
    """Size, time on one thread and, on up to SAMPLE of `rows`, what the form `name` at `path` is worth."""
    accuracy, complexity, _ = accuracies(served, sample(rows, SAMPLE))
    times: dict[str, Any] = {str(tokens): round(milliseconds(path, tokens), 2) for tokens in TIMED}
    megabytes = round(path.stat().st_size / 1e6, 1)
    return {"precision": name, "megabytes": megabytes, "milliseconds": times, "accuracy": accuracy, "auc": complexity}
