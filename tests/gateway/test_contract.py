"""The contract: what the manifests in the model repository must say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.config import ConfigError
from gateway.contract import Contract, read

EMBEDDER = {"fingerprint": "0123456789abcdef", "dimension": 384, "model": "all-MiniLM-L6-v2", "max_tokens": 256}
CLASSIFIER = {"fingerprint": "fedcba9876543210", "labels": ["math", "law", "computer science"], "temperature": 1.3}


def write(repository: Path, part: str, manifest: object) -> Path:
    path = repository / part / "weights/manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write(tmp_path, "embedder", EMBEDDER)
    write(tmp_path, "classifier", CLASSIFIER)
    return tmp_path


def test_both_manifests_make_the_contract(repository: Path) -> None:
    assert read(repository) == Contract(
        labels=("math", "law", "computer science"),
        dimension=384,
        embedder="0123456789abcdef",
        classifier="fedcba9876543210",
    )


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
