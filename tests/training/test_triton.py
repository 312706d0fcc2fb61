"""`router` in the real Triton, against onnxruntime and torch on the same weights."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as grpc
from tokenizers import Tokenizer

from tests.conftest import ROOT
from tests.training.conftest import started
from training.tokens import encode, pad
from training.weights import read_manifest

OUTPUTS = [
    "embedding",
    "embedder_truncated",
    "embedder_fingerprint",
    "category",
    "complexity",
    "classifier_truncated",
    "classifier_fingerprint",
]
LONG = "the tide turns and the harbour fills " * 400


def route(address: str, texts: list[bytes]) -> dict[str, np.ndarray]:
    """One request to `router`: every output by name, [N, ...]."""
    with grpc.InferenceServerClient(address) as client:
        text = grpc.InferInput("text", [len(texts), 1], "BYTES")
        text.set_data_from_numpy(np.array(texts, dtype=object)[:, None])
        answer = client.infer("router", [text])
    assert {output.name for output in answer.get_response().outputs} == set(OUTPUTS)
    return {name: answer.as_numpy(name) for name in OUTPUTS}


def alone(model: str, text: str) -> list[np.ndarray]:
    """The outputs of `model`'s graph for one text, unpadded."""
    weights = ROOT / "model_repository" / model / "weights"
    manifest = read_manifest(weights)
    assert manifest is not None
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    ids, mask = pad(encode(tokenizer, [text], manifest["max_tokens"]))
    session = onnxruntime.InferenceSession(weights / "model.onnx")
    return [output[0] for output in session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})]


def passes(address: str) -> dict[str, int]:
    """How often each member has run its network."""
    with grpc.InferenceServerClient(address) as client:
        return {
            model: client.get_inference_statistics(model).model_stats[0].execution_count
            for model in ("embedder", "classifier")
        }


def test_a_mixed_batch_equals_each_text_alone(triton: str) -> None:
    texts = ["", "Why?", "Explain how tides arise, step by step, to a sailor.", LONG]
    found = route(triton, [text.encode() for text in texts])
    for i, text in enumerate(texts):
        (embedding,) = alone("embedder", text)
        category, complexity = alone("classifier", text)
        np.testing.assert_allclose(found["embedding"][i], embedding, atol=1e-3)
        np.testing.assert_allclose(found["category"][i], category, atol=1e-3)
        np.testing.assert_allclose(found["complexity"][i], complexity, atol=1e-3)
    assert found["embedder_truncated"][:, 0].tolist() == [False, False, False, True]
    assert found["classifier_truncated"][:, 0].tolist() == [False, False, False, True]


def test_answers_carry_the_fingerprints_of_the_manifests(triton: str) -> None:
    found = route(triton, [b"one", b"two"])
    for model in ("embedder", "classifier"):
        manifest = read_manifest(ROOT / "model_repository" / model / "weights")
        assert manifest is not None
        assert found[f"{model}_fingerprint"].tolist() == [[manifest["fingerprint"].encode()]] * 2


def test_requests_at_the_same_time_share_forward_passes(triton: str) -> None:
    texts = [f"{'word ' * (i % 7)}number {i}" for i in range(32)]
    before = passes(triton)
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda text: route(triton, [text.encode()]), texts))
    after = passes(triton)
    for model in ("embedder", "classifier"):
        assert 0 < after[model] - before[model] < len(texts)
    for i in (0, 13, 31):  # each caller gets the answer to its own text
        np.testing.assert_allclose(found[i]["embedding"][0], alone("embedder", texts[i])[0], atol=1e-3)


def test_bytes_that_are_no_text_spoil_neither_the_batch_nor_the_server(triton: str) -> None:
    found = route(triton, [b"\xff\xfe\x00 what", b"What?"])
    np.testing.assert_allclose(found["embedding"][1], alone("embedder", "What?")[0], atol=1e-3)
    assert np.isfinite(found["embedding"]).all()


def test_more_characters_than_are_read_counts_as_truncated(triton: str) -> None:
    assert route(triton, [b" " * 1_000_000])["embedder_truncated"].tolist() == [[True]]


def test_a_batch_past_the_limit_is_refused_and_serving_goes_on(triton: str) -> None:
    with pytest.raises(grpc.InferenceServerException, match="batch"):
        route(triton, [b"x"] * 65)
    assert route(triton, [b"x"] * 64)["complexity"].shape == (64, 1)


def test_missing_weights_are_named_and_triton_does_not_start(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "model_repository", repository, ignore=shutil.ignore_patterns("weights", ".weights-*"))
    with started(repository, tmp_path) as server:
        assert server.process.poll() not in (None, 0)
    assert f"{repository}/embedder/weights/manifest.json is missing" in server.log.read_text()
