"""The contract between training and serving: what the manifests in the model repository say of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import orjson
from pydantic import AfterValidator, ConfigDict, Field

from gateway.checked import ConfigError, Section, line, validate
from gateway.values import Positive, Real, Unit

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class _Described(Section):
    model_config = ConfigDict(extra="ignore")  # the rest is for people


class Abstention(_Described):
    """A prompt whose highest category score is less than `below` has the category `label`."""

    label: str
    below: Unit


class Ability(_Described):
    """How well one model answers: a prompt's difficulty (K,) in, the probability that its answer is right out."""

    weights: tuple[Real, ...]  # (K,)
    bias: Real

    def quality(self, difficulty: Sequence[float]) -> float:
        """sigmoid(weights . difficulty + bias): multidimensional item response theory (Reckase 2009)."""
        logit = self.bias + sum(w * d for w, d in zip(self.weights, difficulty, strict=True))
        return 0.5 * (1 + math.tanh(0.5 * logit))  # the sigmoid, in a form that never overflows


class Threshold(_Described):
    """From this score on, wrong answers were surely no more than `max_error_rate` of those served."""

    max_error_rate: Annotated[float, Field(gt=0, lt=1)]
    score: Real  # log-odds


class Verification(_Described):
    """When an answer to a cached question serves another one, as fitted on labelled pairs."""

    floor: Unit  # similarity below which none is worth verifying
    alike: Unit  # similarity from which questions in the same words need no verifying
    similarity_weight: Annotated[float, Field(ge=0)] = 0.0  # log-odds for each unit of similarity
    thresholds: Annotated[tuple[Threshold, ...], Field(min_length=1)]

    def score(self, said: float, similarity: float) -> float:
        """What the verifier said, less for what the similarity lacks to 1: what serves is also near."""
        return said - self.similarity_weight * (1 - similarity)

    def threshold(self, max_error_rate: float) -> float:
        """The score of the highest error rate that is allowed; infinite when none of those measured is."""
        allowed = [each for each in self.thresholds if each.max_error_rate <= max_error_rate]
        return max(allowed, key=lambda each: each.max_error_rate).score if allowed else math.inf


@dataclass(frozen=True, slots=True)
class Contract:
    labels: tuple[str, ...]  # the categories, in the order of the classifier's scores
    dimension: int  # of the embedding
    embedder: str  # fingerprint of the embedder's weights: vectors of two are never compared
    classifier: str  # fingerprint of the classifier's weights
    verifier: str  # fingerprint of the verifier's weights
    verification: Verification
    abstention: Abstention | None = None
    difficulty: int | None = None  # K, the dimension of a prompt's difficulty
    abilities: Mapping[str, Ability] = field(default_factory=dict)  # by the name they were fitted under

    def category(self, scores: Mapping[str, float]) -> str:
        """The label with the highest score, or that of the abstention when even this is too low."""
        highest = max(scores, key=scores.__getitem__)
        if self.abstention is not None and scores[highest] < self.abstention.below:
            return self.abstention.label
        return highest


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(labels)) < len(labels):
        raise ValueError("a label is given twice")
    return labels


class _Manifest(_Described):
    fingerprint: Fingerprint


class _Embedder(_Manifest):
    dimension: Annotated[int, Field(ge=1)]


class _Classifier(_Manifest):
    labels: Annotated[tuple[str, ...], Field(min_length=2), AfterValidator(_distinct)]
    abstention: Abstention | None = None
    difficulty: Positive | None = None
    abilities: dict[str, Ability] = Field(default_factory=dict)


class _Verifier(_Manifest):
    verification: Verification


M = TypeVar("M", bound=_Manifest)


def read(repository: Path) -> Contract:
    """Read the manifests; raises `ConfigError` naming the file that is missing or wrong."""
    embedder = _manifest(_Embedder, repository / "embedder/weights/manifest.json")
    path = repository / "classifier/weights/manifest.json"
    classifier = _manifest(_Classifier, path)
    verifier = _manifest(_Verifier, repository / "verifier/weights/manifest.json")
    problems = [line(path, *problem) for problem in _inconsistencies(classifier)]
    if problems:
        raise ConfigError("\n".join(problems))
    return Contract(
        labels=classifier.labels,
        dimension=embedder.dimension,
        embedder=embedder.fingerprint,
        classifier=classifier.fingerprint,
        verifier=verifier.fingerprint,
        verification=verifier.verification,
        abstention=classifier.abstention,
        difficulty=classifier.difficulty,
        abilities=classifier.abilities,
    )


def _inconsistencies(classifier: _Classifier) -> Iterator[tuple[str, object, str]]:
    if classifier.abstention and classifier.abstention.label not in classifier.labels:
        yield "abstention.label", classifier.abstention.label, "is not one of the labels"
    if classifier.abilities and classifier.difficulty is None:
        yield "difficulty", None, "missing: abilities need it"
        return
    for name, ability in classifier.abilities.items():
        if len(ability.weights) != classifier.difficulty:
            problem = f"must be {classifier.difficulty} numbers, as difficulty says"
            yield f"abilities.{name}.weights", list(ability.weights), problem


def _manifest(kind: type[M], path: Path) -> M:
    try:
        return validate(kind, orjson.loads(path.read_bytes()), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; `make train` writes it") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from error
