"""What the gateway makes of Triton's answer; that a real Triton gives one is tested in test_api.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gateway.contract import Ability, Abstention, Contract, Threshold, Verification
from gateway.triton import TritonUnavailable, reading

VERIFICATION = Verification(floor=0.5, alike=0.95, thresholds=(Threshold(max_error_rate=0.01, score=1.0),))
CONTRACT = Contract(
    labels=("law", "math", "other"),
    dimension=2,
    embedder="e",
    classifier="c",
    verifier="v",
    verification=VERIFICATION,
    abstention=Abstention(label="other", below=0.5),
    difficulty=2,
    abilities={"weak": Ability(weights=(-1.0, -2.0), bias=0.0), "strong": Ability(weights=(-1.0, 0.0), bias=3.0)},
)


def outputs(**changes: Any) -> dict[str, Any]:
    """Those of `router` for one text."""
    answer = {
        "embedding": [0.6, 0.8],
        "embedder_truncated": [False],
        "embedder_fingerprint": [b"e"],
        "category": [0.2, 0.7, 0.1],
        "complexity": [0.25],
        "difficulty": [1.0, 0.5],
        "classifier_truncated": [False],
        "classifier_fingerprint": [b"c"],
        **changes,
    }
    kinds = {bytes: object, bool: bool, float: np.float32}
    return {name: np.array([values], dtype=kinds[type(values[0])]) for name, values in answer.items()}


def test_what_is_read() -> None:
    read = reading(outputs(), CONTRACT, cut=False)
    assert read.embedding.tolist() == pytest.approx([0.6, 0.8])
    assert read.category == "math"
    assert read.category_scores == pytest.approx({"law": 0.2, "math": 0.7, "other": 0.1})
    assert read.complexity == 0.25
    assert read.quality == pytest.approx({"weak": 0.1192, "strong": 0.8808}, abs=1e-4)
    assert read.truncated is False


def test_an_abstention_leaves_the_scores_alone() -> None:
    read = reading(outputs(category=[0.4, 0.45, 0.15]), CONTRACT, cut=False)
    assert read.category == "other"
    assert read.category_scores == pytest.approx({"law": 0.4, "math": 0.45, "other": 0.15})


@pytest.mark.parametrize("size", [1, 8])
def test_a_manifest_without_abilities(size: int) -> None:
    plain = Contract(CONTRACT.labels, 2, "e", "c", "v", VERIFICATION)
    assert reading(outputs(difficulty=[1.0] * size), plain, cut=False).quality == {}


@pytest.mark.parametrize("truncated", ["embedder_truncated", "classifier_truncated", None])
def test_a_text_that_is_too_long(truncated: str | None) -> None:
    answer = outputs(**({truncated: [True]} if truncated else {}))
    assert reading(answer, CONTRACT, cut=truncated is None).truncated is True


@pytest.mark.parametrize("name", ["embedding", "category", "complexity", "difficulty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(name: str, value: float) -> None:
    answer = outputs()
    answer[name][0, -1] = value
    with pytest.raises(TritonUnavailable, match="not finite"):
        reading(answer, CONTRACT, cut=False)


@pytest.mark.parametrize("part", ["embedder", "classifier"])
def test_other_weights_than_the_manifest_s(part: str) -> None:
    with pytest.raises(TritonUnavailable, match=f"serves {part} new, the manifest describes"):
        reading(outputs(**{f"{part}_fingerprint": [b"new"]}), CONTRACT, cut=False)


def test_another_difficulty_than_the_manifest_s() -> None:
    with pytest.raises(TritonUnavailable, match="is 3 numbers, its manifest says 2"):
        reading(outputs(difficulty=[1.0, 2.0, 3.0]), CONTRACT, cut=False)
