"""The contract: what the manifests in the model repository must say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import ConfigError
from gateway.contract import Ability, Abstention, Contract, Threshold, Verification, read

EMBEDDER = {"fingerprint": "0123456789abcdef", "dimension": 384, "model": "all-MiniLM-L6-v2", "max_tokens": 256}
CLASSIFIER = {"fingerprint": "fedcba9876543210", "labels": ["math", "law", "computer science"], "temperature": 1.3}

POINTS = ({"max_error_rate": 0.001, "score": 4.0}, {"max_error_rate": 0.01, "score": 2.5, "repeats": 0.6})
VERIFIER: dict[str, Any] = {
    "fingerprint": "00112233445566ff",
    "verification": {"floor": 0.6, "alike": 0.95, "thresholds": POINTS, "repeats": 1000},
}
VERIFICATION = Verification(
    floor=0.6,
    alike=0.95,
    thresholds=(Threshold(max_error_rate=0.001, score=4.0), Threshold(max_error_rate=0.01, score=2.5)),
)


def write(repository: Path, part: str, manifest: object) -> Path:
    path = repository / part / "weights/manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write(tmp_path, "embedder", EMBEDDER)
    write(tmp_path, "classifier", CLASSIFIER)
    write(tmp_path, "verifier", VERIFIER)
    return tmp_path


def test_both_manifests_make_the_contract(repository: Path) -> None:
    assert read(repository) == Contract(
        labels=("math", "law", "computer science"),
        dimension=384,
        embedder="0123456789abcdef",
        classifier="fedcba9876543210",
        verifier="00112233445566ff",
        verification=VERIFICATION,
    )


@pytest.mark.parametrize(
    ("allowed", "score"), [(0.5, 2.5), (0.01, 2.5), (0.0099, 4.0), (0.001, 4.0), (0.0009, math.inf)]
)
def test_the_threshold_of_an_error_rate_is_that_of_the_highest_one_that_was_measured(
    allowed: float, score: float
) -> None:
    assert VERIFICATION.threshold(allowed) == score


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("verification", {"verification": None}),
        ("verification.floor", {"verification": {**VERIFIER["verification"], "floor": 1.5}}),
        ("verification.thresholds", {"verification": {**VERIFIER["verification"], "thresholds": []}}),
        ("verification.alike", {"verification": {"floor": 0.5, "thresholds": POINTS}}),
    ],
)
def test_a_wrong_manifest_of_the_verifier_is_named(repository: Path, key: str, changes: dict[str, Any]) -> None:
    path = write(repository, "verifier", {**VERIFIER, **changes})
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {key}")):
        read(repository)


OPTIONAL = {
    "abstention": {"label": "law", "below": 0.4, "chosen_on": "validation"},
    "difficulty": 2,
    "abilities": {"gpt-4o": {"weights": [0.5, -1], "bias": 0.25, "prompts": 1019}},
}


def test_what_a_classifier_s_manifest_may_say(repository: Path) -> None:
    write(repository, "classifier", {**CLASSIFIER, **OPTIONAL})
    contract = read(repository)
    assert contract.abstention == Abstention(label="law", below=0.4)
    assert contract.difficulty == 2
    assert contract.abilities == {"gpt-4o": Ability(weights=(0.5, -1.0), bias=0.25)}


def test_no_abstention_and_no_abilities(repository: Path) -> None:
    plain = read(repository)
    write(repository, "classifier", {**CLASSIFIER, "abstention": None, "difficulty": None, "abilities": {}})
    assert read(repository) == plain


@pytest.mark.parametrize(
    ("key", "manifest"),
    [
        ("abstention.label", {"abstention": {"label": "none", "below": 0.4}}),
        ("abstention.below", {"abstention": {"label": "law", "below": 1.1}}),
        ("abstention.below", {"abstention": {"label": "law", "below": -0.1}}),
        ("abstention.below", {"abstention": {"label": "law"}}),
        ("difficulty", {"difficulty": 0}),
        ("difficulty", {"difficulty": None}),
        ("abilities.a.weights", {"abilities": {"a": {"weights": [1, 2, 3], "bias": 0}}}),
        ("abilities.a.weights", {"abilities": {"a": {"weights": [], "bias": 0}}}),
        ("abilities.a.weights[1]", {"abilities": {"a": {"weights": [1, None], "bias": 0}}}),
        ("abilities.a.weights", {"abilities": {"a": {"bias": 0}}}),
        ("abilities.a.bias", {"abilities": {"a": {"weights": [1, 2]}}}),
        ("abilities.a.bias", {"abilities": {"a": {"weights": [1, 2], "bias": "high"}}}),
    ],
)
def test_an_ability_or_abstention_that_cannot_be(repository: Path, key: str, manifest: dict[str, Any]) -> None:
    path = write(repository, "classifier", {**CLASSIFIER, **OPTIONAL, **manifest})
    with pytest.raises(ConfigError) as caught:
        read(repository)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: {key}: ")


def test_a_weight_that_is_not_finite(repository: Path) -> None:
    raw = json.dumps({**CLASSIFIER, **OPTIONAL}).replace("-1]", "-1e999]").encode()
    path = write(repository, "classifier", raw)
    with pytest.raises(ConfigError, match="is not valid JSON: ") as caught:
        read(repository)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("score", "expected"), [(0.39, "law"), (0.4, "math"), (0.9, "math")], ids=["below", "at the border", "above"]
)
def test_the_category_when_no_score_is_high(score: float, expected: str) -> None:
    scores = {"math": score, "law": 0.05, "physics": 0.1}
    sure = Contract(("math", "law", "physics"), 384, "e", "c", "v", VERIFICATION)
    abstention = Abstention(label="law", below=0.4)
    abstaining = Contract(("math", "law", "physics"), 384, "e", "c", "v", VERIFICATION, abstention=abstention)
    assert sure.category(scores) == "math"
    assert abstaining.category(scores) == expected


NUMBERS = st.floats(-1e6, 1e6)
VECTORS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8)


@given(VECTORS, NUMBERS)
def test_a_quality_is_a_probability(pairs: list[tuple[float, float]], bias: float) -> None:
    weights, difficulty = zip(*pairs, strict=True)
    assert 0 <= Ability(weights=weights, bias=bias).quality(difficulty) <= 1


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=8), st.floats(-3, 3))
def test_a_quality_is_the_sigmoid_of_weights_difficulty_and_bias(pairs: list[tuple[float, float]], bias: float) -> None:
    weights, difficulty = zip(*pairs, strict=True)
    logit = bias + sum(w * d for w, d in pairs)
    reference = 1 / (1 + math.exp(-logit))
    assert Ability(weights=weights, bias=bias).quality(difficulty) == pytest.approx(reference, abs=1e-12)


@pytest.mark.parametrize(("bias", "expected"), [(1e308, 1.0), (-1e308, 0.0), (0.0, 0.5)])
def test_a_quality_at_the_ends(bias: float, expected: float) -> None:
    assert Ability(weights=(0.0,), bias=bias).quality([1.0]) == expected


@pytest.mark.parametrize("part", ["embedder", "classifier"])
def test_a_manifest_that_is_not_there(repository: Path, part: str) -> None:
    path = repository / part / "weights/manifest.json"
    path.unlink()
    with pytest.raises(ConfigError) as caught:
        read(repository)
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory; `make train` writes it"


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("embedder", "fingerprint", "0123"),
        ("embedder", "fingerprint", "0123456789ABCDEF"),
        ("embedder", "fingerprint", "0123456789abcdef\n"),
        ("embedder", "fingerprint", 123),
        ("embedder", "dimension", 0),
        ("embedder", "dimension", "many"),
        ("embedder", "dimension", 384.5),
        ("classifier", "fingerprint", "xyz"),
        ("classifier", "labels", ["math"]),
        ("classifier", "labels", "math"),
        ("classifier", "labels", ["math", "law", "math"]),
        ("classifier", "labels[1]", 2),
    ],
)
def test_a_value_that_cannot_be(repository: Path, part: str, key: str, value: Any) -> None:
    right = EMBEDDER if part == "embedder" else CLASSIFIER
    path = write(
        repository, part, {**right, "labels": ["math", value]} if key == "labels[1]" else {**right, key: value}
    )
    with pytest.raises(ConfigError) as caught:
        read(repository)
    assert str(caught.value).splitlines()[0].startswith(f"{path}: {key}: ")
    assert f"(got {value!r})" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "key"),
    [("embedder", "fingerprint"), ("embedder", "dimension"), ("classifier", "fingerprint"), ("classifier", "labels")],
)
def test_a_missing_key(repository: Path, part: str, key: str) -> None:
    right = EMBEDDER if part == "embedder" else CLASSIFIER
    path = write(repository, part, {k: v for k, v in right.items() if k != key})
    with pytest.raises(ConfigError) as caught:
        read(repository)
    assert str(caught.value) == f"{path}: {key}: missing key"


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"dimension": NaN}'])
def test_not_json(repository: Path, raw: bytes) -> None:
    path = write(repository, "embedder", raw)
    with pytest.raises(ConfigError) as caught:
        read(repository)
    assert str(caught.value).startswith(f"{path}: is not valid JSON: ")


@pytest.mark.parametrize("manifest", [[], None])
def test_not_an_object(repository: Path, manifest: object) -> None:
    path = write(repository, "classifier", manifest)
    with pytest.raises(ConfigError) as caught:
        read(repository)
    assert str(caught.value).startswith(f"{path}: ")
    assert ": : " not in str(caught.value)
