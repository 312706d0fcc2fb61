"""The one round trip to Triton: a text in, its embedding, category scores, complexity and difficulty out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from gateway import config
from gateway.cache import Vector
from gateway.contract import Contract

MODEL = "router"
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


class Router:
    """Client of Triton's `router` model."""

    def __init__(self, settings: config.Triton, contract: Contract) -> None:
        self._settings = settings
        self._contract = contract
        self._client = InferenceServerClient(settings.address, channel_args=_CHANNEL)
        self._outputs = [InferRequestedOutput(name) for name in _OUTPUTS]

    async def read(self, text: str) -> Reading:
        """Raises `TritonUnavailable`."""
        text_input = InferInput("text", [1, 1], "BYTES")
        text_input.set_data_from_numpy(np.array([[text[:MAX_CHARACTERS].encode()]], dtype=np.object_))
        try:
            result = await self._client.infer(
                MODEL, [text_input], outputs=self._outputs, client_timeout=self._settings.timeout_seconds
            )
        except InferenceServerException as error:
            raise TritonUnavailable(f"{self._settings.address}: {error.message()}") from error
        outputs = {name: result.as_numpy(name) for name in _OUTPUTS}
        return reading(outputs, self._contract, cut=len(text) > MAX_CHARACTERS)

    async def check(self) -> None:
        """Raises `TritonUnavailable` when `router` cannot be called."""
        try:
            if await self._client.is_model_ready(MODEL, client_timeout=self._settings.timeout_seconds):
                return
        except InferenceServerException as error:
            raise TritonUnavailable(f"{self._settings.address}: {error.message()}") from error
        raise TritonUnavailable(f"{self._settings.address}: model {MODEL} is not ready")

    async def close(self) -> None:
        await self._client.close()


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


def _check(outputs: dict[str, Any], contract: Contract) -> None:
    for part, known in (("embedder", contract.embedder), ("classifier", contract.classifier)):
        served = outputs[f"{part}_fingerprint"].item().decode()
        if served != known:
            raise TritonUnavailable(f"Triton serves {part} {served}, the manifest describes {known}: restart both")
    if not all(np.isfinite(outputs[name]).all() for name in ("embedding", "category", "complexity", "difficulty")):
        raise TritonUnavailable("the models answered with numbers that are not finite")
    given = outputs["difficulty"].shape[1]
    if contract.difficulty not in (None, given):
        raise TritonUnavailable(
            f"the classifier's difficulty is {given} numbers, its manifest says {contract.difficulty}"
        )
