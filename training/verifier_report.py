"""What the verifier is worth on pairs that it was neither trained nor chosen on: figures, curves, a page to read."""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from training.evaluate import machine, versions
from training.pairs import GroupSplits, Pair, asked
from training.thresholds import Labels, Scores, hits_at, served, weighed
from training.verifier_served import ServedVerifier, similarities
from training.weights import write_json, write_text

TEMPLATES = Path(__file__).parent / "templates"
ERRORS = (0.01, 0.02, 0.05, 0.1)
SHOWN_RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
EXAMPLE = "What are the main renewable energy sources?"
EXAMPLES = [
    Pair(EXAMPLE, "Which are the most important sources of renewable energy?", same=True),
    Pair(EXAMPLE, "What are the main non-renewable energy sources?", same=False),
    Pair("Turn the lights on in the kitchen", "turn the kitchen lights off", same=False),
    Pair("How do I convert JSON to CSV in Python?", "How do I convert CSV to JSON in Python?", same=False),
    Pair("how can I turn csv into json with python", "How do I convert CSV to JSON in Python?", same=True),
]
OURS, OTHER, THIRD = "#0b6e4f", "#8a8f98", "#b3432b"


@dataclass(frozen=True)
class Judged:
    """Labelled pairs and what each way of telling says of them."""

    name: str
    pairs: Sequence[Pair]
    ways: Mapping[str, Scores]  # "verifier" and the baselines

    @property
    def same(self) -> Labels:
        return np.array([pair.same for pair in self.pairs], dtype=bool)


def judged(name: str, verifier: ServedVerifier, pairs: Sequence[Pair]) -> Judged:
    cosine = similarities(pairs)
    scores = scored(verifier, pairs, cosine, f"verify, {name}")
    floor = verifier.manifest["verification"]["floor"]
    words = np.array([overlap(pair.question, pair.cached) for pair in pairs])
    ways = {"verifier": np.where(cosine >= floor, scores, -np.inf), "cosine": cosine, "shared words": words}
    return Judged(name, pairs, {name: np.nan_to_num(value, neginf=-99.0) for name, value in ways.items()})


def scored(verifier: ServedVerifier, pairs: Sequence[Pair], cosine: Scores, progress: str | None = None) -> Scores:
    """What the gateway decides by [N]; a manifest of before has no weight."""
    weight = verifier.manifest["verification"].get("similarity_weight", 0.0)
    return weighed(verifier.scores(pairs, progress), cosine, weight)


def overlap(one: str, other: str) -> float:
    """Jaccard similarity of two texts' words."""
    a, b = (set(re.findall(r"\w+", text.casefold())) for text in (one, other))
    return len(a & b) / max(len(a | b), 1)


def figures(found: Judged, verification: Mapping[str, Any]) -> dict[str, Any]:
    same = found.same
    thresholds = {point["max_error_rate"]: point["score"] for point in verification["thresholds"]}
    return {
        "name": found.name,
        "repeats": int(same.sum()),
        "traps": int((~same).sum()),
        "auc": {way: float(roc_auc_score(same, scores)) for way, scores in found.ways.items()},
        "at_error": {
            way: {str(error): hits_at(scores, same, error) for error in ERRORS} for way, scores in found.ways.items()
        },
        "at_traps": {way: _at_traps(scores, same, 0.01) for way, scores in found.ways.items()},
        "points": {
            str(rate): served(found.ways["verifier"], same, thresholds[rate])
            for rate in SHOWN_RATES
            if rate in thresholds
        },
    }


def _at_traps(scores: Scores, same: Labels, share: float) -> float:
    """The share of the repeats that is served when at most `share` of the traps is."""
    traps = np.sort(scores[~same])[::-1]
    return float((scores[same] > traps[int(share * len(traps))]).mean()) if len(traps) else 1.0


def _rate(point: Mapping[str, Any]) -> float:
    return float(point["max_error_rate"])


def by_kind(found: Judged, threshold: float) -> list[dict[str, Any]]:
    kinds = np.array([pair.kind for pair in found.pairs])
    scores = found.ways["verifier"]
    rows = []
    for kind in sorted(set(kinds), key=lambda kind: (kind != "same", kind)):
        here = kinds == kind
        rows.append({"kind": kind, "pairs": int(here.sum()), "served": int((scores[here] >= threshold).sum())})
    return rows


def public_pairs(folder: Path) -> list[Pair]:
    """Quora's question pairs: evaluation only."""
    with gzip.open(folder / "qqp_pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Pair(row["b"], row["a"], bool(row["same"])) for row in rows]


def similarity_of_sentences(folder: Path, verifier: ServedVerifier) -> dict[str, float]:
    """Spearman's correlation with people's scores of the STS benchmark, which asks another question than ours."""
    with gzip.open(folder / "stsb_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs, gold = [Pair(row["a"], row["b"], same=False) for row in rows], [row["score"] for row in rows]
    ways = {"verifier": verifier.scores(pairs), "cosine": similarities(pairs)}
    return {way: float(spearmanr(scores, gold).statistic) for way, scores in ways.items()}


def write_report(
    weights: Path,
    splits: GroupSplits,
    folder: Path,
    history: Sequence[Mapping[str, float]] = (),
    public: Path | None = None,
    most: int = 10_000,
) -> dict[str, Any]:
    """Measure the verifier in `weights` on the test groups and public pairs; write metrics.json, report.md, plots."""
    verifier = ServedVerifier(weights)
    verification = verifier.manifest["verification"]
    sets = [judged("own held-out pairs", verifier, asked(splits.test))]
    sentences: dict[str, float] = {}
    if public is not None:
        pairs = public_pairs(public)
        step = max(len(pairs) // most, 1)
        sets.append(judged("Quora question pairs", verifier, pairs[::step][:most]))
        sentences = similarity_of_sentences(public, verifier)
    cosines = similarities(EXAMPLES)
    scores = scored(verifier, EXAMPLES, cosines)
    thresholds = verification["thresholds"]
    default = max((p for p in thresholds if p["max_error_rate"] <= 0.01), key=_rate, default=min(thresholds, key=_rate))
    metrics = {
        "fingerprint": verifier.manifest["fingerprint"],
        "precision": verifier.manifest["precision"],
        "groups": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        "verification": verification,
        "default": default,
        "sets": [figures(found, verification) for found in sets],
        "kinds": by_kind(sets[0], default["score"]),
        "sentences": sentences,
        "history": list(history),
        "examples": [
            {"question": pair.question, "cached": pair.cached, "same": pair.same, "cosine": float(c), "score": float(s)}
            for pair, s, c in zip(EXAMPLES, scores, cosines, strict=True)
        ],
        "machine": machine(),
        "versions": versions(),
    }
    write_json(folder / "metrics.json", metrics)
    for number, found in enumerate(sets):
        precision_recall(folder / f"precision-recall-{number}.png", found, verification)
    templates = Environment(  # noqa: S701 (Markdown)
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_text(folder / "report.md", templates.get_template("verifier.md.j2").render(metrics))
    return metrics


def precision_recall(path: Path, found: Judged, verification: Mapping[str, Any]) -> None:
    """Precision of what is served against the share of the repeats that is, for every threshold of every way."""
    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    same = found.same
    for (way, scores), colour in zip(found.ways.items(), (OURS, OTHER, THIRD), strict=True):
        order = np.argsort(-scores, kind="stable")
        right = np.cumsum(same[order])
        axes.plot(right / same.sum(), right / np.arange(1, len(order) + 1), color=colour, label=way)
    for point in verification["thresholds"]:
        hit = served(found.ways["verifier"], same, point["score"])
        total = hit["hits"] + hit["wrong"]
        if point["max_error_rate"] in SHOWN_RATES and total:
            axes.plot(hit["hit_rate"], hit["hits"] / total, "o", color=OURS)
            axes.annotate(f"{point['max_error_rate']:g}", (hit["hit_rate"], hit["hits"] / total), fontsize=8)
    axes.set(title=found.name, xlabel="share of the true repeats that is served", ylabel="precision of what is served")
    axes.set(xlim=(0, 1), ylim=(max(0, float(same.mean()) - 0.05), 1.005))
    axes.legend(loc="lower left")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
