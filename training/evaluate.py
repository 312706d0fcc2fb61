"""Figures of exported weights on the test split, beside baselines that learn from the same training rows."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.baselines import (
    Part,
    Predict,
    Score,
    category_baselines,
    complexity_baselines,
    grades,
    routing_baselines,
)
from training.benchmarks import LICENCES, PAIRS
from training.frozen import Embed
from training.measures import Floats, Metrics, Pair, Perturbed, SetFigures, Source, evaluate_set, pair, robustness
from training.objective import graded_models
from training.perturb import PERTURBATIONS
from training.publish import form_figures, sample
from training.rows import Row, Splits, rows_digest
from training.served import Readings, Served

OURS = "this classifier"
JOINED = (64, 512, 2048)  # tokens
PER_CATEGORY = 8  # joined texts
FEW = 30  # test rows below which a source is no set of its own
PERTURBED = 500  # rows
LIMITS = [
    "Complexity is learnt from a judgement of prompts, not from models' answers; abilities are learnt from answers.",
    "Abilities from public benchmarks are those on multiple-choice questions; other work needs its own graded answers.",
    "Most prompts are English; other languages were a twentieth of our own prompts, and none of the benchmarks'.",
]


def evaluate(weights: Path, splits: Splits, embed: Embed) -> Metrics:
    """Measure the classifier in `weights` on the test rows, source by source.

    The baselines learn from `splits.train` and choose by `splits.validation`, as the classifier did; those on frozen
    embeddings get them from `embed`. Raises NoWeights.
    """
    served = Served(weights)
    train, validation = (Part(rows, embed(_texts(rows))) for rows in (splits.train, splits.validation))
    print("baselines: fitting")
    categories, complexities = category_baselines(train, validation), complexity_baselines(train, validation)
    metrics: Metrics = {"sets": [], "robustness": {}, "pairs": []}
    for name, rows in by_source(splits.test):
        part = Part(rows, embed(_texts(rows)))
        found = served.read(_texts(rows), progress=f"read {name}")
        metrics["sets"] += [_set(name, served, part, found, categories, complexities), *_joined(name, served, rows)]
        metrics["robustness"][name] = _robustness(served, rows, found)
        for both in _pairs(rows, served):
            print(f"baselines: routing {both[0]} to {both[1]}")
            routed = _routed(name, served, part, found, both, routing_baselines(train, validation, *both))
            metrics["pairs"] += [routed] if routed else []
    return {
        **metrics,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "base": served.manifest["base"],
        "sources": made_of(served.manifest),
        "exports": [form_figures(served.manifest["precision"], served, weights / "model.onnx", splits.test)],
        "ours": OURS,
        "limits": LIMITS,
    }


def made_of(manifest: Mapping[str, Any]) -> list[Source]:
    """The data that made the classifier of `manifest`, those of the heads that its training started from included."""
    own: list[Source] = [source.copy() for source in manifest["trained_on"]]
    if not manifest["started_from"]:
        return own
    before = made_of(manifest["started_from"])
    for source in before:
        source["used_for"] += " (of the heads started from)"
    return own + before


def by_source(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each source that has FEW or more; all rows together when no source has."""
    names = sorted({row.source for row in rows})
    large = [(name, found) for name in names if len(found := [row for row in rows if row.source == name]) >= FEW]
    yield from large or [("all", list(rows))]


def sources(splits: Splits) -> list[Source]:
    """What teaches what, by source."""
    named = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    found: list[Source] = []
    for name in sorted({row.source for rows in named.values() for row in rows}):
        parts = {split: [row for row in rows if row.source == name] for split, rows in named.items()}
        rows = [row for part in parts.values() for row in part]
        heads = ("category", "complexity", "correct")
        found.append(
            {
                "name": name,
                "rows": {split: len(part) for split, part in parts.items()},
                "digest": rows_digest(rows),
                "licence": LICENCES.get(name, "its owner's"),
                "used_for": ", ".join(
                    head for head in heads if any(getattr(row, head) not in (None, {}) for row in rows)
                ),
            }
        )
    return found


def _texts(rows: Sequence[Row]) -> list[str]:
    return [row.text for row in rows]


def _set(
    name: str,
    served: Served,
    part: Part,
    found: Readings,
    categories: Mapping[str, Predict],
    complexities: Mapping[str, Score],
) -> SetFigures:
    place = {label: i for i, label in enumerate(served.labels)}
    stop = served.manifest["abstention"]
    return evaluate_set(
        name,
        served.labels,
        _true(part.rows, place),
        _uncalibrated(served, found),
        found.category,
        complexity=found.complexity,
        true_complexity=np.array([np.nan if row.complexity is None else row.complexity for row in part.rows]),
        tokens=found.tokens,
        kinds=[row.kind for row in part.rows],
        abstention=stop and (stop["label"], stop["below"]),
        baselines={key: np.array([place.get(c, -1) for c in guess(part)]) for key, guess in categories.items()},
        complexity_baselines={key: score(part) for key, score in complexities.items()},
    )


def _uncalibrated(served: Served, found: Readings) -> Floats:
    """Logits [N, L], up to a constant a row, as they were before the temperature."""
    logits: Floats = np.log(found.category.clip(1e-12)) * served.manifest["calibration"]["temperature"]
    return logits


def _joined(name: str, served: Served, rows: Sequence[Row]) -> Iterator[SetFigures]:
    """Long texts: rows of one category in a row until they have the tokens."""
    place = {label: i for i, label in enumerate(served.labels)}
    for tokens in JOINED:
        long = [Row(text, category) for category, text in _joined_texts(served, rows, tokens)]
        if len(long) >= FEW:
            found = served.read(_texts(long))
            title = f"{name}, joined to {tokens} tokens"
            logits = _uncalibrated(served, found)
            yield evaluate_set(title, served.labels, _true(long, place), logits, found.category, tokens=found.tokens)


def _joined_texts(served: Served, rows: Sequence[Row], tokens: int) -> Iterator[tuple[str, str]]:
    """Category and text; every row of the category begins one, and those after it (from the front again) fill it."""
    for category in sorted({row.category for row in rows if row.category in served.labels}):
        texts = [row.text for row in rows if row.category == category]
        sizes = [len(encoding.ids) for encoding in served.tokenizer.encode_batch(texts)]
        for start in range(0, len(texts), max(len(texts) // PER_CATEGORY, 1)):
            order = [*range(start, len(texts)), *range(start)]
            enough = next((n for n, length in enumerate(accumulate(sizes[i] for i in order), 1) if length >= tokens), 0)
            if enough:
                ids = served.tokenizer.encode("\n\n".join(texts[i] for i in order[:enough])).ids
                yield category, served.tokenizer.decode(ids[1 : tokens - 1])


def _robustness(served: Served, rows: Sequence[Row], plain: Readings) -> dict[str, Perturbed]:
    rows, indices = sample(rows, PERTURBED), sample(range(len(rows)), PERTURBED)
    place = {label: i for i, label in enumerate(served.labels)}

    def read(change: Callable[[str, Random], str]) -> tuple[Floats, Floats]:
        draw = Random(0)  # noqa: S311 (nothing secret)
        found = served.read([change(row.text, draw) for row in rows])
        return found.category, found.complexity

    changed = {name: read(change) for name, change in PERTURBATIONS.items()}
    return robustness(_true(rows, place), (plain.category[indices], plain.complexity[indices]), changed)


def _pairs(rows: Sequence[Row], served: Served) -> Iterator[tuple[str, str]]:
    """The pairs that are published by others, where the rows have their grades; else the worst and the best model."""
    models = [model for model in graded_models(rows) if model in served.manifest["abilities"]]
    known = [both for both in PAIRS if set(both) <= set(models)]
    if not known and len(models) > 1:
        means = {model: np.mean([row.correct[model] for row in rows if model in row.correct]) for model in models}
        known = [(min(models, key=means.__getitem__), max(models, key=means.__getitem__))]
    yield from known


def _routed(
    name: str, served: Served, part: Part, found: Readings, both: tuple[str, str], baselines: Mapping[str, Score]
) -> Pair | None:
    """Ours is the gain that the two abilities predict."""
    weak, strong = both
    known = np.array([weak in row.correct and strong in row.correct for row in part.rows])
    graded = part.where(lambda row: weak in row.correct and strong in row.correct)
    weak_right, strong_right = (served.right(model, found.difficulty[known]) for model in both)
    scores = {key: score(graded) for key, score in baselines.items()}
    return pair(weak, strong, name, grades(graded.rows, weak, strong), (OURS, strong_right - weak_right), scores)


def _true(rows: Sequence[Row], place: Mapping[str, int]) -> NDArray[np.int64]:
    return np.array([-1 if row.category is None else place.get(row.category, -1) for row in rows])


def machine() -> str:
    return f"{platform.machine()}, {_processor()}"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "onnxruntime", "scikit-learn")}


def _processor() -> str:
    """The processor's name and how many of it there are."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
