"""`router` in the real Triton, against onnxruntime and torch on the same weights."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as grpc

from tests.conftest import ROOT
from tests.training.conftest import started
from training.export import named
from training.tokens import read_tokenizer, windows
from training.weights import read_manifest

OUTPUTS = [
    "embedding",
    "embedder_truncated",
    "embedder_fingerprint",
    "category",
    "complexity",
    "difficulty",
    "classifier_truncated",
    "classifier_fingerprint",
]
LONG = "the tide turns and the harbour fills " * 400  # 2,800 tokens: more than either reads
WINDOWS = "the tide turns and the harbour fills " * 100  # 700: several windows of the classifier


def route(address: str, texts: list[bytes]) -> dict[str, np.ndarray]:
    """One request to `router`: every output by name, [N, ...]."""
    with grpc.InferenceServerClient(address) as client:
        text = grpc.InferInput("text", [len(texts), 1], "BYTES")
        text.set_data_from_numpy(np.array(texts, dtype=object)[:, None])
        answer = client.infer("router", [text])
    assert {output.name for output in answer.get_response().outputs} == set(OUTPUTS)
    return {name: answer.as_numpy(name) for name in OUTPUTS}


def alone(model: str, text: str) -> list[np.ndarray]:
    """The outputs of `model`'s graph for one text, its windows unpadded where there is one only."""
    weights = ROOT / "model_repository" / model / "weights"
    manifest = read_manifest(weights)
    assert manifest is not None
    window = manifest.get("window", manifest["max_tokens"])
    inputs = windows(read_tokenizer(weights), [text], window, manifest["max_tokens"] // window).tensors()
    session = onnxruntime.InferenceSession(weights / "model.onnx")
    return [output[0] for output in session.run(None, named(session, inputs[: len(session.get_inputs())]))]


def tolerance(model: str) -> float:
    """How far an answer may be from that to the text alone; in int8 every text is read alone."""
    manifest = read_manifest(ROOT / "model_repository" / model / "weights")
    assert manifest is not None
    return {"float32": 1e-3, "float16": 1e-2, "int8": 1e-3}[manifest.get("precision", "float32")]


def passes(address: str) -> dict[str, int]:
    """How often each member has run its network."""
    with grpc.InferenceServerClient(address) as client:
        return {
            model: client.get_inference_statistics(model).model_stats[0].execution_count
            for model in ("embedder", "classifier")
        }


def test_a_mixed_batch_equals_each_text_alone(triton: str) -> None:
    texts = ["", "Why?", "Explain how tides arise, step by step, to a sailor.", WINDOWS, LONG]
    found = route(triton, [text.encode() for text in texts])
    for i, text in enumerate(texts):
        (embedding,) = alone("embedder", text)
        category, complexity, difficulty = alone("classifier", text)
        np.testing.assert_allclose(found["embedding"][i], embedding, atol=tolerance("embedder"))
        np.testing.assert_allclose(found["category"][i], category, atol=tolerance("classifier"))
        np.testing.assert_allclose(found["complexity"][i], complexity, atol=tolerance("classifier"))
        np.testing.assert_allclose(found["difficulty"][i], difficulty, atol=10 * tolerance("classifier"))
    assert found["embedder_truncated"][:, 0].tolist() == [False, False, False, True, True]
    assert found["classifier_truncated"][:, 0].tolist() == [False, False, False, False, True]


def test_the_end_of_a_long_text_is_read(triton: str) -> None:
    """Beyond the first window only the classifier reads on."""
    found = route(triton, [WINDOWS.encode(), f"{WINDOWS} Prove the Riemann hypothesis.".encode()])
    assert np.array_equal(*found["embedding"])
    assert not np.array_equal(*found["difficulty"])


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
    found = route(triton, [b" " * 1_000_000])
    assert found["embedder_truncated"].tolist() == found["classifier_truncated"].tolist() == [[True]]


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
