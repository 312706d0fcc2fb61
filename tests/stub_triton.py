"""A stub that speaks Triton's gRPC protocol: `python tests/stub_triton.py PORT [CERTIFICATE KEY AUTHORITY]`.

It serves `router` and `embedder` with models of its own: an embedding is the hashed and counted words of a text, so
that texts of the same words are near; the category is the first label that occurs in the text; a text grows complex
with its length; an answer serves another question as surely as their words are the same, but never where one has a
"not" more. `write_manifests` describes these models to a gateway.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

DIMENSION = 384
MAX_WORDS = 256
LABELS = ["code", "math", "other"]
FINGERPRINTS = {"embedder": "00000000000000e1", "classifier": "00000000000000c1", "verifier": "00000000000000f1"}
MODELS = ("router", "embedder", "verifier")
VERIFICATION = {
    "floor": 0.5,
    "alike": 0.95,
    "thresholds": [{"max_error_rate": 0.001, "score": 5.0}, {"max_error_rate": 0.01, "score": 1.0}],
}


def write_manifests(repository: Path) -> Path:
    """The manifests that a gateway reads, for what is served here; returns `repository`."""
    more: dict[str, dict[str, Any]] = {
        "embedder": {"dimension": DIMENSION},
        "classifier": {"labels": LABELS, "difficulty": 1},
        "verifier": {"verification": VERIFICATION},
    }
    for part, fingerprint in FINGERPRINTS.items():
        folder = repository / part / "weights"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint, **more[part]}))
    return repository


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def embedding(text: str) -> np.ndarray[Any, Any]:
    """(DIMENSION,), of length 1."""
    vector = np.zeros(DIMENSION, dtype=np.float32)
    for word in words(text) or [""]:
        vector[int(hashlib.sha256(word.encode()).hexdigest(), 16) % DIMENSION] += 1
    return vector / np.linalg.norm(vector)


def category(text: str) -> list[float]:
    found = next((label for label in LABELS if label in words(text)), "other")
    return [0.8 if label == found else 0.1 for label in LABELS]


def embedder(texts: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    fingerprint = FINGERPRINTS["embedder"].encode()
    return {
        "embedding": np.stack([embedding(text) for text in texts]),
        "truncated": np.array([[len(words(text)) > MAX_WORDS] for text in texts]),
        "fingerprint": np.array([[fingerprint]] * len(texts), dtype=object),
    }


def router(texts: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    embedded, lengths = embedder(texts), np.array([[len(words(text))] for text in texts], dtype=np.float32)
    return {
        "embedding": embedded["embedding"],
        "embedder_truncated": embedded["truncated"],
        "embedder_fingerprint": embedded["fingerprint"],
        "category": np.array([category(text) for text in texts], dtype=np.float32),
        "complexity": lengths / (lengths + 50),
        "difficulty": lengths,
        "classifier_truncated": embedded["truncated"],
        "classifier_fingerprint": np.array([[FINGERPRINTS["classifier"].encode()]] * len(texts), dtype=object),
    }


def verifier(questions: list[str], cached: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The score is 1 at a cosine of 0.8, and never more than 3."""
    pairs = list(zip(questions, cached, strict=True))
    scores = [
        1 + 10 * (float(embedding(one) @ embedding(other)) - 0.8) - 9 * differ(one, other) for one, other in pairs
    ]
    return {
        "score": np.array(scores, dtype=np.float32)[:, None],
        "truncated": np.array([[max(len(words(text)) for text in pair) > MAX_WORDS] for pair in pairs]),
        "fingerprint": np.array([[FINGERPRINTS["verifier"].encode()]] * len(pairs), dtype=object),
    }


def differ(one: str, other: str) -> bool:
    return words(one).count("not") != words(other).count("not")


ANSWERS: dict[str, Any] = {"router": router, "embedder": embedder, "verifier": verifier}


class Stub(service_pb2_grpc.GRPCInferenceServiceServicer):
    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802 (the protocol's name)
        return service_pb2.ModelReadyResponse(ready=request.name in MODELS)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.model_name not in MODELS:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.model_name}")
        columns = [[t.decode() for t in deserialize_bytes_tensor(raw)] for raw in request.raw_input_contents]
        texts = columns[0]
        if any(list(given.shape) != [len(texts), 1] for given in request.inputs) or len(texts) > 64:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a batch has the shape [n, 1], n at most 64")
        if any("break triton" in text for text in texts):
            await context.abort(grpc.StatusCode.INTERNAL, "the stub breaks")
        if any("slow triton" in text for text in texts):
            await asyncio.sleep(0.2)
        answers = ANSWERS[request.model_name](*columns)
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for output in request.outputs:
            add(response, output.name, answers[output.name])
        return response


def add(response: Any, name: str, values: np.ndarray[Any, Any]) -> None:
    kinds = {"f": "FP32", "b": "BOOL", "O": "BYTES"}
    tensor = response.outputs.add()
    tensor.name, tensor.datatype = name, kinds[values.dtype.kind]
    tensor.shape.extend(values.shape)
    raw = serialize_byte_tensor(values).item() if values.dtype.kind == "O" else values.tobytes()
    response.raw_output_contents.append(raw)


def credentials(certificate: str, key: str, authority: str) -> grpc.ServerCredentials:
    """TLS; clients must show certificates of the authority."""
    pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
    return grpc.ssl_server_credentials([pair], Path(authority).read_bytes(), require_client_auth=True)


async def serve(port: int, files: list[str]) -> None:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Stub(), server)
    if files:
        server.add_secure_port(f"127.0.0.1:{port}", credentials(*files))
    else:
        server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2:]))
