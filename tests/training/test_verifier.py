"""The verifier: what it sees of a pair, what it can learn; what is exported and shipped is what was trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gateway.contract import Threshold, Verification
from training.base import Base, load_base
from training.model import merged
from training.pairs import Group, GroupSplits, Pair, Trap, asked
from training.rows import BadRows
from training.thresholds import weighed
from training.verifier import (
    FIRST,
    SECOND,
    SHIPPED,
    TrainedVerifier,
    Verifier,
    adapted,
    encode_pairs,
    load_verifier,
    on_both,
    packed,
    save_verifier,
    unpacked,
)
from training.verifier_served import ServedVerifier, export_verifier
from training.verify import Settings, fit, platt, score, train_verifier

PAIRS = [
    Pair("How do I turn the lights on?", "how do i turn the lights off", same=False),
    Pair("Why?", "How come?", same=True),
    Pair("What is 5 + 7?", "What is the sum of five and seven? " * 4, same=True),
]


@pytest.fixture
def base() -> Base:
    return load_base("small")


@pytest.fixture
def verifier(base: Base) -> Verifier:
    torch.manual_seed(0)
    made = Verifier(adapted(base), base.trunk.config.hidden_size)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # as if it were trained
    return made.eval()


def test_what_both_sides_have_is_seen(base: Base) -> None:
    ids, mask, side = encode_pairs(base.tokenizer, PAIRS[:1]).tensors([0])
    tokens = [str(base.tokenizer.id_to_token(int(i))) for i in ids[0]]
    assert tokens[0] == "[CLS]"
    words = {each: [t for t, s in zip(tokens, side[0].tolist(), strict=True) if s == each] for each in (FIRST, SECOND)}
    assert " ".join(words[FIRST]) == "how do i turn the lights on ?"
    assert " ".join(words[SECOND]) == "how do i turn the lights off"
    shared = [t for t, is_shared in zip(tokens, on_both(ids, side)[0], strict=True) if is_shared]
    assert " ".join(shared) == "how do i turn the lights how do i turn the lights"
    assert mask.all()


def test_padding_changes_nothing(base: Base, verifier: Verifier) -> None:
    encoded = encode_pairs(base.tokenizer, PAIRS)
    with torch.inference_mode():
        together = verifier(*encoded.tensors([0, 1, 2]))
        alone = torch.cat([verifier(*encoded.tensors([i])) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_pair_that_is_not_all_read_is_told(base: Base) -> None:
    long = Pair("word " * 300, "word " * 300, same=True)
    strange = Pair("Is \u4dc0 good?", "Is \u4dc1 good?", same=False)  # neither is in the vocabulary
    assert encode_pairs(base.tokenizer, [long, PAIRS[0], strange]).truncated == [True, False, True]


def test_matrices_in_eight_bits_are_nearly_the_same() -> None:
    state = {"a": torch.randn(40, 60), "b": torch.randn(7), "c": torch.tensor(2.5), "d": torch.zeros(3, 3)}
    back = unpacked(packed(state))
    assert back.keys() == state.keys()
    assert torch.equal(back["b"], state["b"])
    assert torch.equal(back["d"], state["d"])
    assert ((back["a"] - state["a"]).abs().amax(1) <= state["a"].abs().amax(1) / 254 + 1e-6).all()


def test_what_is_saved_comes_back(base: Base, verifier: Verifier, tmp_path: Path) -> None:
    before = score(verifier, base.tokenizer, PAIRS)
    save_verifier(tmp_path / "v", TrainedVerifier(verifier, {"seed": 3}), base)
    assert sum(path.stat().st_size for path in (tmp_path / "v").rglob("*")) < 4e6
    loaded = load_verifier(tmp_path / "v", load_base("small"))
    assert loaded.facts == {"seed": 3}
    np.testing.assert_allclose(score(loaded.verifier, base.tokenizer, PAIRS), before, atol=0.05)


def test_what_is_exported_says_what_torch_says(base: Base, verifier: Verifier, tmp_path: Path) -> None:
    with torch.inference_mode():
        encoded = encode_pairs(base.tokenizer, PAIRS)
        expected = verifier(*encoded.tensors([0, 1, 2]))[:, 0].numpy()
    whole = merged(verifier).eval()
    named = export_verifier(whole, base.tokenizer, tmp_path / "verifier", {"a": 1}, "float32")
    served = ServedVerifier(tmp_path / "verifier" / "weights")
    assert served.manifest["fingerprint"] == named
    np.testing.assert_allclose(served.scores(PAIRS), expected, atol=1e-3)
    long = Pair("word " * 300, "word " * 300, same=True)
    assert served.scores([long]).tolist() == [-np.inf]


def test_the_gateway_weighs_the_similarity_as_the_thresholds_were_fitted() -> None:
    gateway = Verification(floor=0, alike=1, similarity_weight=4, thresholds=(Threshold(max_error_rate=0.01, score=0),))
    said, near = np.array([3.0, -1.0, -np.inf]), np.array([1.0, 0.75, 0.5])
    assert [gateway.score(*each) for each in zip(said, near, strict=True)] == weighed(said, near, 4).tolist()


def test_it_learns_what_a_few_groups_say(base: Base, tmp_path: Path) -> None:
    """Colours that are the same, and those that are not: on pairs that it has seen, better than chance at once."""
    groups = [
        Group(
            f"Show me the {thing} in red",
            (f"show me the {thing} in crimson",),
            (Trap(f"Show me the {thing} in blue", ""),),
        )
        for thing in ("car", "house", "dress", "bag", "lamp", "chair", "book", "boat")
    ]
    splits = GroupSplits(groups * 8, groups, groups)
    settings: Any = Settings((tmp_path,), "small", tmp_path, epochs=3, seed=0)
    trained, history = fit(base, splits, settings)
    pairs = asked(groups)
    scores, same = score(trained, base.tokenizer, pairs), np.array([pair.same for pair in pairs])
    assert scores[same].min() > scores[~same].max()
    assert history[-1]["auc"] == 1.0


def test_without_an_epoch_only_the_thresholds_are_fitted(base: Base, tmp_path: Path) -> None:
    groups = [Group("Show me the car in red", ("show me the car in crimson",), (Trap("Show me the car in blue", ""),))]
    splits = GroupSplits(groups, groups, groups)
    fitted, history = fit(base, splits, Settings((tmp_path,), "small", tmp_path, epochs=0, seed=0, start=SHIPPED))
    assert history == []
    before = load_verifier(SHIPPED, load_base("small")).verifier.state_dict()
    for name, value in fitted.state_dict().items():
        if name not in ("scale", "bias"):
            torch.testing.assert_close(value, before[name], msg=name)
    with pytest.raises(BadRows, match="--start"):
        train_verifier(Settings((tmp_path,), "small", tmp_path, epochs=0, seed=0))


def test_platt_scaling_makes_log_odds() -> None:
    draw = np.random.default_rng(0)
    same = draw.random(20_000) < 0.5
    logits = np.where(same, 1.0, -1.0) + draw.normal(0, 1, 20_000)  # log-odds of two normals: 2 x
    scale, bias = platt(logits, same)
    assert scale == pytest.approx(2, rel=0.05)
    assert bias == pytest.approx(0, abs=0.05)
