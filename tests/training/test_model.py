"""From texts to scores: windows, padding, pooling, low-rank updates; and heads that are kept and taken up again."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.conftest import Heads, Run
from training.base import load_base
from training.fit import Plan, started
from training.heads import ForeignBase, load_heads, save_heads
from training.lexical import PAIRS, Lexical
from training.model import Classifier, merged, with_lora
from training.tokens import Windows, batches, encode, mean_pool, pad, windows

SHORT, LONG = "name garlic", "prove the tide turns and the harbour fills " * 20  # 160 words, three windows of 64


def test_batches_hold_every_text_once_and_respect_the_budget() -> None:
    lengths = [3 + 7 * i % 58 for i in range(200)]
    for shuffle in (None, random.Random(1)):  # noqa: S311
        grouped = list(batches(lengths, 128, shuffle))
        assert sorted(i for batch in grouped for i in batch) == list(range(200))
        assert all(len(batch) * max(lengths[i] for i in batch) <= 128 for batch in grouped)


def test_padding_changes_no_mean() -> None:
    hidden = torch.randn(2, 5, 4)
    _, mask = pad([[1, 2, 3], [1, 2, 3, 4, 5]])
    pooled = mean_pool(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0, :3].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1].mean(0))


def test_windows_hold_every_token_once_and_say_what_is_left_out(heads: Heads) -> None:
    tokenizer = heads.base.tokenizer
    for words, count, truncated in ((6, 1, False), (7, 2, False), (18, 3, False), (19, 3, True)):
        found = windows(tokenizer, ["name", " ".join(["tide"] * words)], window=8, most=3)
        assert found.text == [0] + [1] * count
        assert found.truncated == [False, truncated]
        assert all(len(ids) <= 8 and (ids[0], ids[-1]) == (101, 102) for ids in found.ids)
        inside = [token for ids in found.ids[1:] for token in ids[1:-1]]
        assert inside == encode(tokenizer, ["tide " * words], 1000)[0][1:-1][:18]
    both = windows(tokenizer, [LONG, "", SHORT], 64, 4)
    assert both.of([2, 0]) == Windows([both.ids[-1], *both.ids[:-2]], [0, 1, 1, 1], [False, False])


def test_a_long_text_is_the_mean_over_the_tokens_of_all_its_windows(heads: Heads) -> None:
    classifier = heads.trained.router.classifier
    cut = windows(heads.base.tokenizer, [SHORT, LONG], 64, 4)
    assert [len(ids) for ids in cut.ids] == [4, 64, 64, 38]
    with torch.no_grad():
        found = classifier(*cut.tensors())
        hidden = [
            classifier.trunk(torch.tensor([ids]), torch.ones(1, len(ids))).last_hidden_state[0] for ids in cut.ids
        ]
        for i, states in enumerate((hidden[0], torch.cat(hidden[1:]))):
            pooled = nn.functional.layer_norm(states.mean(0), (32,))
            torch.testing.assert_close(found.category[i], classifier.category(pooled), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.difficulty[i], classifier.difficulty(pooled), atol=1e-4, rtol=1e-4)


def test_neither_padding_nor_other_texts_change_an_answer(heads: Heads) -> None:
    together = heads.read([SHORT, LONG, "", "prove the endgame"])
    for i, text in enumerate([SHORT, LONG, "", "prove the endgame"]):
        for all_of_them, alone in zip(together, heads.read([text]), strict=True):
            torch.testing.assert_close(all_of_them[i], alone[0], atol=1e-4, rtol=1e-4)


def test_lora_trains_every_linear_layer_and_merges_without_a_change(tiny_base: Path) -> None:
    trunk = load_base(str(tiny_base)).trunk
    adapted = with_lora(trunk)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len({name.split(".lora_B")[0] for name in trained if ".lora_B." in name}) == 4 * 4  # Wqkv, Wo; Wi, Wo
    assert all(".lora_" in name or "norm" in name for name in trained)
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    classifier = Classifier(adapted, 32, 3, 2).eval()
    nn.init.normal_(classifier.category.weight)
    batch = (*pad([[101, 2054, 102], [101, 2054, 2003, 2023, 102]]), torch.arange(2))
    with torch.no_grad():
        before, after = classifier(*batch).category, merged(classifier)(*batch).category
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_heads_that_are_kept_say_what_they_said(heads: Heads, tiny_base: Path, tmp_path: Path) -> None:
    kept = replace(heads.trained, abstention=0.3)
    save_heads(tmp_path / "heads", kept, heads.base)
    back = Heads(base := load_base(str(tiny_base)), load_heads(tmp_path / "heads", base))
    assert replace(back.trained, router=kept.router) == kept
    for found, expected in zip(back.read([SHORT, LONG]), heads.read([SHORT, LONG]), strict=True):
        assert torch.equal(found, expected)
    assert sum(file.stat().st_size for file in (tmp_path / "heads").rglob("*")) < 4e6
    with pytest.raises(ForeignBase, match="not on this other"):
        load_heads(tmp_path / "heads", replace(base, name="other", digest="0"))
    with pytest.raises(FileNotFoundError, match="no trained heads"):
        load_heads(tmp_path, base)


def test_training_starts_from_kept_heads_as_far_as_they_mean_the_same(
    heads: Heads, trained: Run, tiny_base: Path
) -> None:
    same = heads.trained.labels, heads.trained.models
    inputs = windows(heads.base.tokenizer, [SHORT, LONG], 64, 4).tensors()
    lexical = Lexical(PAIRS + 30522, 10)

    def begun(labels: tuple[str, ...], models: tuple[str, ...], start: Path | None) -> Classifier:
        base = load_base(str(tiny_base))
        plan = Plan(labels, models, epochs=1, seed=0, window=64, windows=4, start=start)
        return started(base, lexical, plan).classifier.eval()

    def says(classifier: Classifier) -> dict[str, Tensor]:
        with torch.no_grad():
            scores = classifier(*inputs)
            return {**vars(scores), "right": classifier.right(scores.difficulty)}

    folder = trained.report / "heads"
    kept, before = says(heads.trained.router.classifier), says(begun(*same, None))
    again, other = begun(*same, folder), begun(("x", "y"), ("m",), folder)
    for name, expected in kept.items():
        torch.testing.assert_close(says(again)[name], expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before[name], expected, atol=1e-3)
    found = says(other)
    torch.testing.assert_close(found["difficulty"], kept["difficulty"], atol=1e-5, rtol=1e-5)  # the adapter's work
    assert not found["category"].any()
    assert found["right"].shape[1] == 1
    learns = [{name for name, p in c.named_parameters() if p.requires_grad} for c in (again, begun(*same, None))]
    assert learns[0] == learns[1]
