"""Figures against sklearn's; a report of everything, and one of next to nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from training import measures
from training.measures import Metrics, SetFigures
from training.report import table, write_report

LABELS = ["law", "math", "other"]


def drawn(n: int = 400, name: str = "held-out <prompts> & more") -> tuple[SetFigures, dict[str, Any]]:
    """Figures of a made-up model on a set, and the arrays they came from."""
    draw = np.random.default_rng(0)
    true = draw.integers(-1, 2, size=n)  # some without a category, none of the last one
    logits = draw.normal(size=(n, 3)) + 2 * np.eye(3)[true]
    probabilities = np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True)
    hard = np.where(draw.random(n) < 0.2, np.nan, draw.random(n))
    complexity = np.clip(np.nan_to_num(hard, nan=0.5) + draw.normal(size=n) / 5, 0, 1)
    arrays = {"true": true, "logits": logits, "probabilities": probabilities, "complexity": complexity}
    found = measures.evaluate_set(
        name,
        LABELS,
        **arrays,
        true_complexity=hard,
        tokens=draw.integers(1, 600, size=n),
        kinds=[None if i % 3 == 0 else ("code" if i % 2 else "everyday") for i in range(n)],
        abstention=("other", 0.5),
        baselines={"majority class": np.zeros(n, dtype=int), "of another set": np.full(n, -1)},
        complexity_baselines={"prompt length": draw.random(n)},
    )
    return found, arrays


def full() -> Metrics:
    found, arrays = drawn()
    n = len(arrays["true"])
    draw = np.random.default_rng(1)
    weak, strong = ((draw.random(n) < share).astype(np.float64) for share in (0.4, 0.7))
    pair = measures.pair("small|8B", "large", "exam", (weak, strong), ("ours", draw.random(n)), {"random": np.zeros(n)})
    assert pair is not None
    plain = arrays["probabilities"], arrays["complexity"]
    return {
        "id": "20260101-000000",
        "created": "2026-01-01",
        "machine": "two cores",
        "versions": {"torch": "2.13"},
        "base": "small",
        "settings": {"epochs": 3},
        "sources": [
            {"name": "own", "rows": {"train": 8, "test": 1}, "digest": "ab", "licence": "Apache-2.0", "used_for": "all"}
        ],
        "sets": [found],
        "robustness": {found["name"]: measures.robustness(arrays["true"], plain, {"typos": (plain[0][::-1], None)})},
        "pairs": [pair],
        "exports": [
            {"precision": "int8", "megabytes": 27.0, "milliseconds": {"16": 4.6}, "accuracy": 0.8, "auc": float("nan")}
        ],
        "history": [{"loss": 1.0, "accuracy": 0.5}, {"loss": 0.8, "accuracy": 0.6}],
        "ours": "ModernBERT <small>",
        "limits": ["English only."],
    }


def test_category_figures_are_those_of_sklearn() -> None:
    found, arrays = drawn()
    known = arrays["true"] >= 0
    true, predicted = arrays["true"][known], arrays["probabilities"][known].argmax(1)
    category = found["category"]
    assert category is not None
    assert category["rows"] == known.sum()
    assert category["confusion"] == confusion_matrix(true, predicted, labels=[0, 1, 2]).tolist()
    assert category["accuracy"]["value"] == pytest.approx((true == predicted).mean())
    assert category["macro_f1"]["value"] == pytest.approx(f1_score(true, predicted, labels=[0, 1], average="macro"))
    precision, recall, f1, rows = precision_recall_fscore_support(true, predicted, labels=[0, 1, 2], zero_division=0)
    for i, found_class in enumerate(category["classes"]):
        assert (found_class["category"], found_class["rows"]) == (LABELS[i], rows[i])
        assert found_class["precision"] == pytest.approx(precision[i])
        assert (found_class["recall"] or 0) == pytest.approx(recall[i])
        assert found_class["f1"] == pytest.approx(f1[i])
    assert category["classes"][2]["recall"] is None  # it has no rows
    assert category["baselines"]["of another set"]["accuracy"] == {"value": 0, "low": 0, "high": 0}
    for slices in (category["by_length"], category["by_kind"]):
        assert all(0 <= s["accuracy"] <= 1 for s in slices)
    assert sum(s["rows"] for s in category["by_length"]) == known.sum()
    assert [s["name"] for s in category["by_kind"]] == ["code", "everyday"]


def test_intervals_are_those_of_resampled_rows() -> None:
    draw = np.random.default_rng(2)
    true = draw.integers(0, 3, size=300)
    predicted = np.where(draw.random(300) < 0.7, true, draw.integers(0, 3, size=300))
    found = measures.category_baseline(true, predicted, 3)
    samples = [draw.integers(300, size=300) for _ in range(1000)]
    accuracies = [(true[rows] == predicted[rows]).mean() for rows in samples]
    scores = [f1_score(true[rows], predicted[rows], average="macro") for rows in samples]
    for figure, values in (("accuracy", accuracies), ("macro_f1", scores)):
        low, high = np.quantile(values, [0.025, 0.975])
        assert found[figure]["low"] == pytest.approx(low, abs=0.015)  # type: ignore[literal-required]
        assert found[figure]["high"] == pytest.approx(high, abs=0.015)  # type: ignore[literal-required]
    assert found["standard_error"] == pytest.approx(np.std(accuracies), rel=0.1)


def test_calibration_error_and_abstention_by_hand() -> None:
    bins = measures.reliability(np.array([0.05, 0.92, 0.98, 1.0]), np.array([0, 1, 1, 0]))
    assert [b["rows"] for b in bins] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    assert measures.calibration_error(bins) == pytest.approx((0.05 + 3 * abs(2.9 / 3 - 2 / 3)) / 4)
    probabilities = np.array([[0.9, 0.1, 0.0], [0.4, 0.35, 0.25], [0.2, 0.7, 0.1], [0.1, 0.45, 0.45]])
    found = measures.abstained(LABELS, np.array([0, 2, 0, 1]), probabilities, "other", 0.5)
    assert found == {"label": "other", "below": 0.5, "share": 0.5, "accuracy_of_rest": 0.5, "accuracy": 0.5}


def test_a_pair_without_a_gap_is_left_out() -> None:
    assert measures.pair("a", "b", "set", (np.ones(4), np.ones(4)), ("ours", np.arange(4.0)), {}) is None


class Page(HTMLParser):
    """What a page refers to, and whether each picture says what it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            named = dict(attrs)
            assert named["alt"]
            self.images.append(str(named["src"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_full_report(tmp_path: Path) -> None:
    metrics = full()
    page = write_report(metrics, tmp_path).read_text()
    parsed = Page(page)
    assert parsed.open == []
    assert set(parsed.images) == {path.name for path in tmp_path.glob("*.png")}
    assert len(parsed.images) == 7
    assert "ModernBERT &lt;small&gt;" in page
    assert not re.search(r"https?://|nan|None", page)
    card = (tmp_path / "model_card.md").read_text()
    assert "| own | train 8, test 1 | all | Apache-2.0 | ab |" in card
    assert "small\\|8B" in card
    assert "English only." in card
    assert "\n\n\n" not in card
    assert not re.search(r"nan|None|&lt;", card)
    json.dumps(measures.plain(metrics), allow_nan=False)
    lines = table(metrics).splitlines()
    assert any(line.startswith("majority class") for line in lines)
    assert any(line.startswith("ModernBERT <small>") for line in lines)
    assert any(line.startswith("random") and "0.500 [0.500, 0.500]" in line for line in lines)


def test_a_report_leaves_out_what_is_absent(tmp_path: Path) -> None:
    found, arrays = drawn()
    bare = measures.evaluate_set("own", LABELS, *(arrays[key] for key in ("true", "logits", "probabilities")))
    assert bare["complexity"] is None
    none = measures.evaluate_set("unlabelled", LABELS, np.full(3, -1), np.zeros((3, 3)), np.ones((3, 3)) / 3)
    for metrics in ({}, {"sets": [bare, none]}, {"sets": [{**found, "category": None}]}):
        page = write_report(metrics, tmp_path).read_text()  # type: ignore[arg-type]
        assert Page(page).open == []
        assert "Routing" not in page
        assert "Exports" not in page
        assert "## Limits" in (tmp_path / "model_card.md").read_text()
    assert table({}) == ""
