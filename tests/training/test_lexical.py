"""The bag of words in the graph against the sparse features it stands for, and what it learns."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import Tensor, nn

from training.export import SEQUENCES, convert, to_onnx
from training.lexical import PAIRS, Counts, Lexical, fit_lexical
from training.model import Calibration, Classifier, Router
from training.objective import Targets
from training.tokens import pad

VOCABULARY = 50
CLS, SEP = 1, 2


def drawn(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    """Token ids of texts, with their special tokens."""
    draw = random.Random(seed)  # noqa: S311
    return [[CLS, *(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, longest))), SEP] for _ in range(count)]


def router(lexical: Lexical, labels: int) -> Router:
    return Router(Classifier(nn.Identity(), 4, labels, 0), lexical, Calibration())


def test_the_table_gives_what_the_sparse_features_give() -> None:
    counts = Counts.of(drawn(200), VOCABULARY)
    weights = np.random.default_rng(0).normal(size=(VOCABULARY + PAIRS, 5))
    texts = drawn(30, seed=1)
    expected = counts.features(texts) @ weights
    found = router(counts.lexical(weights), 4).words(*pad(texts), torch.arange(30))
    np.testing.assert_allclose(found[:, :5], expected, atol=5e-3)  # the table is in half precision
    np.testing.assert_allclose(found[:, 5], np.log([len(text) for text in texts]) - 3, rtol=1e-5)


def test_windows_of_a_text_add_up_and_special_tokens_say_nothing() -> None:
    counts = Counts.of(drawn(200), VOCABULARY)
    words = router(counts.lexical(np.ones((VOCABULARY + PAIRS, 1))), 0)
    parts = [[CLS, 5, 6, 7, SEP], [CLS, 8, SEP], [CLS, 9, 9, SEP]]
    found = words.words(*pad(parts), torch.tensor([0, 0, 1]))
    idf = counts.idf
    grams = [[5, 6, 7, 8], [9, 9]]
    assert idf[[CLS, SEP]].tolist() == [0, 0]
    for i, text in enumerate(grams):
        assert (idf[text] > 0).all()
        inside = [
            VOCABULARY + (a * 31_337 + b * 7_919) % PAIRS
            for part in ([parts[0], parts[1]], [parts[2]])[i]
            for a, b in pairwise(part)
        ]
        both = idf[text + inside]
        assert found[i, 0].item() == pytest.approx(both.sum() / np.sqrt((both**2).sum()), abs=5e-3)


def test_a_text_without_a_known_word_says_nothing() -> None:
    counts = Counts.of([[CLS, 5, SEP], [CLS, 6, SEP]], VOCABULARY)
    found = router(counts.lexical(np.ones((VOCABULARY + PAIRS, 1))), 0).words(
        *pad([[CLS, SEP], [CLS, 7, 8, SEP]]), torch.arange(2)
    )
    assert found[:, 0].tolist() == [0, 0]


class Words(nn.Module):
    def __init__(self, of: Router) -> None:
        super().__init__()
        self.of = of

    def forward(self, input_ids: Tensor, attention_mask: Tensor, text: Tensor) -> Tensor:
        return self.of.words(input_ids, attention_mask, text)


def test_two_thousand_rare_words_survive_half_precision(tmp_path: Path) -> None:
    """A sum of squared weights of 4,000 n-grams, 100 each, is more than a half-precision number can hold."""
    counts = Counts(np.full(VOCABULARY + PAIRS, 10.0), VOCABULARY)
    lexical = counts.lexical(np.random.default_rng(0).normal(size=(VOCABULARY + PAIRS, 4)))
    module = Words(router(lexical, 3)).eval()
    draw = random.Random(0)  # noqa: S311
    inputs = (*pad([[draw.randrange(VOCABULARY) for _ in range(256)] for _ in range(9)]), torch.tensor([0] * 8 + [1]))
    (tmp_path / "words.onnx").write_bytes(to_onnx(module, ["words"], [*SEQUENCES, "text"]).SerializeToString())
    convert(tmp_path / "words.onnx", tmp_path / "half.onnx", "float16")
    half = OnnxModel(onnx.load(tmp_path / "half.onnx"))
    half.topological_sort()
    evaluator = ReferenceEvaluator(half.model)  # onnxruntime does not keep to half precision on a CPU
    names = "input_ids", "attention_mask", "text"
    (found,) = evaluator.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    np.testing.assert_allclose(np.asarray(found)[:2], module(*inputs)[:2], atol=0.05)


def test_it_learns_the_words_that_matter_and_nothing_from_missing_labels() -> None:
    ids = drawn(600, longest=8)
    is_there = np.array([10 in text for text in ids])
    category = torch.tensor([-100 if i % 3 == 0 else int(there) for i, there in enumerate(is_there)])
    missing = torch.full((600,), float("nan"))
    complexity = torch.where(torch.arange(600) % 2 == 0, missing, torch.tensor(is_there).float())
    right = torch.stack([torch.tensor(is_there).float(), missing], 1)
    lexical = fit_lexical(ids, Targets(category, complexity, right), labels=3, directions=2, vocabulary=VOCABULARY)
    assert lexical.table.shape == (VOCABULARY + PAIRS, 3 + 1 + 2)
    table = lexical.table.float()
    assert table[:VOCABULARY, 1].argmax() == 10
    assert table[10, 0] == -table[10, 1]
    assert table[:VOCABULARY, 3].argmax() == 10
    assert table[:VOCABULARY, 4].abs().argmax() == 10
    assert not table[:, 2].any()  # a category without rows
    assert not table[:, 5].any()  # one model alone has one direction
    assert table.isfinite().all()


def test_the_same_rows_give_the_same_table() -> None:
    ids = drawn(300)
    draw = torch.Generator().manual_seed(0)
    wanted = Targets(torch.randint(4, (300,), generator=draw), torch.rand(300, generator=draw), torch.zeros(300, 0))
    once, again = (fit_lexical(ids, wanted, labels=4, directions=2, vocabulary=VOCABULARY) for _ in range(2))
    assert torch.equal(once.table, again.table)
