"""The whole of `make train`: rows -> review -> base -> fit -> calibrate -> choose precision -> export -> evaluate."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training.base import load_base
from training.evaluate import evaluate, sources
from training.fit import Plan, fit, unfinished
from training.frozen import remembering
from training.heads import SHIPPED, save_heads
from training.measures import Metrics, plain
from training.objective import graded_models
from training.publish import measured_precisions, publish
from training.report import table, write_report
from training.review import as_json, out_of_fold, review, summary, without_leaks
from training.rows import BadRows, Splits, labels, rows_digest, split
from training.sources import read
from training.weights import appearing, read_manifest, sweep, write_json, write_manifest

RUNS = Path("runs")


@dataclass(frozen=True)
class Settings:
    data: tuple[str, ...]  # files, folders, Hub data sets
    base: str
    start: str  # "base": untrained heads; "shipped": the adapter and, where labels agree, the heads shipped
    repository: Path
    epochs: int
    seed: int
    window: int
    windows: int


def train(settings: Settings) -> Path:
    """Train, measure and export the classifier; return the folder of the run.

    Raises BadRows, BaseError, ForeignBase or ParityError; then nothing in the repository has changed.
    """
    began = time.monotonic()
    sweep(RUNS)
    splits = without_leaks(split(read(settings.data)))
    rows = [*splits.train, *splits.validation, *splits.test]
    names, models = labels(rows), graded_models(splits.train)
    if len(names) < 2:
        raise BadRows([f"category: {names or 'no row has one'}; at least two are needed"])
    print(f"data: {', '.join(settings.data)}: {_sizes(splits)}; {len(names)} categories, {len(models)} graded models")
    embed = remembering()
    findings = review(splits, out_of_fold(rows, embed, settings.seed))
    print(summary(findings))
    base = load_base(settings.base)
    before = SHIPPED if settings.start == "shipped" else None
    plan = Plan(names, models, settings.epochs, settings.seed, settings.window, settings.windows, before)
    trained, history = fit(base, splits, plan, checkpoint := unfinished(RUNS, base, splits, plan))
    facts = {"trained_on": sources(splits), "started_from": _origin(before), "data_digest": rows_digest(rows)}
    trained = replace(trained, facts=facts)
    precision, exports = measured_precisions(trained, base, splits.validation, splits.test)
    trained = replace(trained, facts={**facts, "precision": precision})
    run, weights = RUNS / time.strftime("%Y%m%d-%H%M%S"), settings.repository / "classifier" / "weights"
    with appearing(run) as folder:
        save_heads(folder / "heads", trained, base)
        publish(trained, base, settings.repository, precision)
        metrics = evaluate(weights, splits, embed)
        metrics |= {"id": run.name, "history": history, "exports": exports}
        metrics["settings"] = {key: str(value) for key, value in asdict(settings).items()}
        write_manifest(weights, {**(read_manifest(weights) or {}), "metrics": brief(metrics)})
        write_json(folder / "review.json", as_json(findings))
        _write(folder, metrics)
        write_manifest(folder, {"seconds": round(time.monotonic() - began), "findings": len(findings)})
    checkpoint.unlink(missing_ok=True)
    print(table(metrics))
    print(f"report: {run / 'report.html'}")
    return run


def report(repository: Path, data: Sequence[str]) -> Path:
    """Measure what `repository` serves on the test rows of `data`; return the folder with the report.

    Raises BadRows or NoWeights.
    """
    splits = without_leaks(split(read(data)))
    metrics = evaluate(repository / "classifier" / "weights", splits, remembering())
    run = RUNS / time.strftime("%Y%m%d-%H%M%S-evaluate")
    with appearing(run) as folder:
        _write(folder, {**metrics, "id": run.name})
    print(table(metrics))
    print(f"report: {run / 'report.html'}")
    return run


def _write(folder: Path, metrics: Metrics) -> None:
    write_json(folder / "metrics.json", plain(metrics))
    write_report(metrics, folder)


def _origin(heads: Path | None) -> dict[str, Any] | None:
    """What made the heads that training starts from: their data, and the heads they started from themselves."""
    before = read_manifest(heads) if heads else None
    return before and {key: before[key] for key in ("trained_on", "started_from", "data_digest")}


def brief(metrics: Metrics) -> dict[str, dict[str, float | None]]:
    """A few figures of each set, for the manifest of the weights."""
    found: dict[str, dict[str, float | None]] = {}
    for each in metrics["sets"]:
        category, complexity = each["category"], each["complexity"]
        accuracy = {"accuracy": category["accuracy"]["value"], "ece": category["ece"]} if category else {}
        found[each["name"]] = {**accuracy, **({"complexity_auc": complexity["auc"]} if complexity else {})}
    return found


def _sizes(splits: Splits) -> str:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return ", ".join(f"{len(rows)} {name}" for name, rows in parts.items()) + " rows"
