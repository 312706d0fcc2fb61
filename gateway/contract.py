"""The contract between training and serving: what the manifests in the model repository say of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import orjson
from pydantic import AfterValidator, ConfigDict, Field

from gateway.checked import ConfigError, Section, validate

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


@dataclass(frozen=True, slots=True)
class Contract:
    labels: tuple[str, ...]  # the categories, in the order of the classifier's scores
    dimension: int  # of the embedding
    embedder: str  # fingerprint of the embedder's weights: vectors of two are never compared
    classifier: str  # fingerprint of the classifier's weights


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(labels)) < len(labels):
        raise ValueError("a label is given twice")
    return labels


class _Manifest(Section):
    model_config = ConfigDict(extra="ignore")  # the rest is for people

    fingerprint: Fingerprint


class _Embedder(_Manifest):
    dimension: Annotated[int, Field(ge=1)]


class _Classifier(_Manifest):
    labels: Annotated[tuple[str, ...], Field(min_length=2), AfterValidator(_distinct)]


M = TypeVar("M", bound=_Manifest)


def read(repository: Path) -> Contract:
    """Read both manifests; raises `ConfigError` naming the file that is missing or wrong."""
    embedder = _manifest(_Embedder, repository / "embedder/weights/manifest.json")
    classifier = _manifest(_Classifier, repository / "classifier/weights/manifest.json")
    return Contract(classifier.labels, embedder.dimension, embedder.fingerprint, classifier.fingerprint)


def _manifest(kind: type[M], path: Path) -> M:
    try:
        return validate(kind, orjson.loads(path.read_bytes()), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; `make train` writes it") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from error
