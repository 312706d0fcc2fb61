"""The round trips to Triton: texts in; embeddings, and for routing category scores, complexity and difficulty, out.

And two questions in, and out of it the log-odds that one answer serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from gateway import config
from gateway.cache import Vector
from gateway.config import EMBEDDER
from gateway.contract import Contract

MODEL = "router"
VERIFIER = "verifier"
UNREAD = -math.inf  # the score of a pair that is longer than the verifier reads
BATCH_TEXTS = 8  # of one call: a request that is being routed meanwhile waits for no more than these
MAX_CHARACTERS = 32_768  # longer texts are cut before they are sent, and count as truncated

_OUTPUTS = (
    "embedding",
    "embedder_truncated",
    "embedder_fingerprint",
    "category",
    "complexity",
    "difficulty",
    "classifier_truncated",
    "classifier_fingerprint",
)
_EMBEDDER_OUTPUTS = ("embedding", "truncated", "fingerprint")
_VERIFIER_OUTPUTS = ("score", "truncated", "fingerprint")
# gRPC waits up to two minutes between attempts to reconnect unless told otherwise.
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]


class TritonUnavailable(Exception):
    """Triton did not answer, not in time, or with other weights than the manifests describe."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the models read in a text."""

    embedding: Vector  # (dimension,), L2-normalised
    category: str  # the likeliest, or the one that stands for "none of them surely"
    category_scores: dict[str, float]  # label -> probability
    complexity: float  # probability that a small model will not do
    quality: dict[str, float]  # ability -> probability that a model of this ability answers right
    truncated: bool  # the text is longer than the models read


@dataclass(frozen=True, slots=True)
class Embedded:
    embedding: Vector  # (dimension,), L2-normalised
    truncated: bool  # the text is longer than the embedder reads


class Router:
    """Client of Triton's `router` model, and of the `embedder` in it."""

    def __init__(self, settings: config.Triton, contract: Contract) -> None:
        self._settings = settings
        self._contract = contract
        self._client = InferenceServerClient(settings.address, channel_args=_CHANNEL, **_tls(settings.tls))
        self._outputs = [InferRequestedOutput(name) for name in _OUTPUTS]
        self._embedder_outputs = [InferRequestedOutput(name) for name in _EMBEDDER_OUTPUTS]
        self._verifier_outputs = [InferRequestedOutput(name) for name in _VERIFIER_OUTPUTS]

    async def read(self, text: str) -> Reading:
        """Raises `TritonUnavailable`."""
        (read,) = await self.read_all([text])
        return read

    async def read_all(self, texts: Sequence[str]) -> list[Reading]:
        """What is read in each text, in several calls one after the other. Raises `TritonUnavailable`."""
        return [
            reading(row, self._contract, cut=len(text) > MAX_CHARACTERS)
            for part in _parts(texts)
            for text, row in zip(part, _rows(await self._infer(MODEL, _alone(part), self._outputs)), strict=True)
        ]

    async def embed(self, texts: Sequence[str]) -> list[Embedded]:
        """As `read_all`, by the embedder alone. Raises `TritonUnavailable`."""
        return [
            embedded(row, self._contract, cut=len(text) > MAX_CHARACTERS)
            for part in _parts(texts)
            for text, row in zip(
                part, _rows(await self._infer(EMBEDDER, _alone(part), self._embedder_outputs)), strict=True
            )
        ]

    async def _embedded(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        return list(_rows(await self._infer(EMBEDDER, _alone(texts), self._embedder_outputs)))

    async def verify(self, question: str, cached: Sequence[str]) -> list[float]:
        """The log-odds that the answer to each cached question serves this one, too. Raises `TritonUnavailable`."""
        pairs = [(question, other) for other in cached]
        outputs = await self._infer(VERIFIER, pairs, self._verifier_outputs, ("question", "cached"))
        for served in outputs["fingerprint"]:
            _check_fingerprint("verifier", served, self._contract.verifier)
        _check_finite(outputs, ("score",))
        read = zip(pairs, outputs["score"][:, 0], outputs["truncated"][:, 0], strict=True)
        return [UNREAD if cut or max(map(len, pair)) > MAX_CHARACTERS else float(score) for pair, score, cut in read]

    async def _infer(
        self,
        model: str,
        texts: Sequence[tuple[str, ...]],
        wanted: list[InferRequestedOutput],
        names: Sequence[str] = ("text",),
    ) -> dict[str, Any]:
        """The outputs, each (len(texts), n), say, of one call with a column of texts for each name."""
        inputs = [_column(name, [row[i] for row in texts]) for i, name in enumerate(names)]
        try:
            result = await self._client.infer(
                model, inputs, outputs=wanted, client_timeout=self._settings.timeout_seconds
            )
        except InferenceServerException as error:
            raise TritonUnavailable(f"{self._settings.address}: {error.message()}") from error
        return {output.name(): result.as_numpy(output.name()) for output in wanted}

    async def check(self) -> None:
        """Raises `TritonUnavailable` when `router` or `verifier` cannot be called."""
        for model in (MODEL, VERIFIER):
            try:
                is_ready = await self._client.is_model_ready(model, client_timeout=self._settings.timeout_seconds)
            except InferenceServerException as error:
                raise TritonUnavailable(f"{self._settings.address}: {error.message()}") from error
            if not is_ready:
                raise TritonUnavailable(f"{self._settings.address}: model {model} is not ready")

    async def close(self) -> None:
        await self._client.close()


def _tls(settings: config.ClientTls | None) -> dict[str, Any]:
    """The `tls` section as tritonclient takes it."""
    if settings is None:
        return {}
    files = {
        "root_certificates": settings.ca_file,
        "certificate_chain": settings.cert_file,
        "private_key": settings.key_file,
    }
    return {"ssl": True, **{name: str(path) for name, path in files.items() if path is not None}}


def _alone(texts: Sequence[str]) -> list[tuple[str, ...]]:
    return [(text,) for text in texts]


def _column(name: str, texts: Sequence[str]) -> InferInput:
    """BYTES [len(texts), 1]"""
    column = InferInput(name, [len(texts), 1], "BYTES")
    column.set_data_from_numpy(np.array([[text[:MAX_CHARACTERS].encode()] for text in texts], dtype=np.object_))
    return column


def reading(outputs: dict[str, Any], contract: Contract, *, cut: bool) -> Reading:
    """What the outputs of `router` for one text, each (1, n), say; raises `TritonUnavailable` if they cannot be used.

    `cut`: the text was longer than what was sent.
    """
    _check(outputs, contract)
    scores = dict(zip(contract.labels, outputs["category"][0].tolist(), strict=True))
    difficulty = outputs["difficulty"][0].tolist()
    return Reading(
        embedding=outputs["embedding"][0],
        category=contract.category(scores),
        category_scores=scores,
        complexity=outputs["complexity"].item(),
        quality={name: ability.quality(difficulty) for name, ability in contract.abilities.items()},
        truncated=cut or outputs["embedder_truncated"].item() or outputs["classifier_truncated"].item(),
    )


def embedded(outputs: dict[str, Any], contract: Contract, *, cut: bool) -> Embedded:
    """What the outputs of `embedder` for one text say, as `reading`."""
    _check_fingerprint("embedder", outputs["fingerprint"], contract.embedder)
    _check_finite(outputs, ("embedding",))
    return Embedded(outputs["embedding"][0], cut or outputs["truncated"].item())


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts of one call after those of another."""
    return (texts[i : i + BATCH_TEXTS] for i in range(0, len(texts), BATCH_TEXTS))


def _rows(outputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The outputs for each text alone, each (1, n), say."""
    length = len(outputs["embedding"])
    return ({name: values[i : i + 1] for name, values in outputs.items()} for i in range(length))


def _check(outputs: dict[str, Any], contract: Contract) -> None:
    _check_fingerprint("embedder", outputs["embedder_fingerprint"], contract.embedder)
    _check_fingerprint("classifier", outputs["classifier_fingerprint"], contract.classifier)
    _check_finite(outputs, ("embedding", "category", "complexity", "difficulty"))
    given = outputs["difficulty"].shape[1]
    if contract.difficulty not in (None, given):
        raise TritonUnavailable(
            f"the classifier's difficulty is {given} numbers, its manifest says {contract.difficulty}"
        )


def _check_fingerprint(part: str, served: Any, known: str) -> None:
    if (name := served.item().decode()) != known:
        raise TritonUnavailable(f"Triton serves {part} {name}, the manifest describes {known}: restart both")


def _check_finite(outputs: dict[str, Any], names: Sequence[str]) -> None:
    if not all(np.isfinite(outputs[name]).all() for name in names):
        raise TritonUnavailable("the models answered with numbers that are not finite")
