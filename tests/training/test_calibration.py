"""The loss, and what is fitted on the validation rows, on data made by a known rule."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training.calibration import Ability, abilities, ability, abstention, calibrate, scaled_loss
from training.objective import Targets, graded_models, loss, targets
from training.rows import Row

NONE = float("nan")
ROWS = [
    Row("a", "x", None, {"m": 1.0}),
    Row("b", None, 0.25, {}),
    Row("c", "y", 1.0, {"m": 0.0, "n": 0.5}),
]


def sampled(logits: Tensor) -> Tensor:
    return torch.bernoulli(torch.sigmoid(logits))


def only_category(true: Tensor) -> Targets:
    return Targets(true, torch.full((len(true),), NONE), torch.zeros(len(true), 0))


def test_labels_as_tensors() -> None:
    assert graded_models(ROWS) == ["m", "n"]
    found = targets(ROWS, ["x", "y"], ["m", "n"])
    assert found.category.tolist() == [0, -100, 1]
    assert found.complexity.nan_to_num(-1).tolist() == [-1, 0.25, 1]
    assert found.right.nan_to_num(-1).tolist() == [[1, -1], [-1, -1], [0, 0.5]]
    assert targets(ROWS, ["x", "y"], []).right.shape == (3, 0)


def test_the_loss_by_hand() -> None:
    category, complexity = torch.tensor([[2.0, 0], [9, 9], [0, 1]]), torch.tensor([[9.0], [0], [2]])
    right = torch.tensor([[1.0, 9], [9, 9], [0, 0]])
    by_category = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    by_complexity = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    by_right = (math.log(1 + math.exp(-1)) + math.log(2)) / 2  # of the last row the mean over its two models
    found = loss(category, complexity, right, targets(ROWS, ["x", "y"], ["m", "n"])).item()
    assert found == pytest.approx(by_category + 0.5 * by_complexity + 0.5 * by_right)


def test_a_missing_label_teaches_nothing() -> None:
    outputs = [torch.randn(3, width, requires_grad=True) for width in (2, 1, 2)]
    category, complexity, right = outputs
    loss(category, complexity, right, targets(ROWS, ["x", "y"], ["m", "n"]), smoothing=0.1).backward()
    taught = [output.grad.ne(0) for output in outputs if output.grad is not None]
    assert taught[0].all(1).tolist() == [True, False, True]
    assert taught[1][:, 0].tolist() == [False, True, True]
    assert taught[2].tolist() == [[True, False], [False, False], [True, True]]


@pytest.mark.parametrize("lacking", ["complexity", "correct"])
def test_without_any_label_of_a_kind_the_loss_is_still_a_number(lacking: str) -> None:
    rows = [replace(row, complexity=None) if lacking == "complexity" else replace(row, correct={}) for row in ROWS]
    names, models = ["x", "y"], graded_models(rows)
    category, complexity, right = (torch.randn(3, n, requires_grad=True) for n in (len(names), 1, len(models)))
    value = loss(category, complexity, right, targets(rows, names, models), smoothing=0.1)
    value.backward()
    assert value.isfinite()
    assert all(part.grad is None or part.grad.isfinite().all() for part in (category, complexity, right))


def test_being_too_sure_costs_nothing_once_scaled() -> None:
    torch.manual_seed(0)
    logits, score, right = torch.randn(500, 3), torch.randn(500, 1), torch.randn(500, 2)
    true = torch.distributions.Categorical(logits=logits).sample()
    wanted = Targets(true, sampled(score[:, 0]), sampled(right))
    honest = scaled_loss(logits, score, right, wanted)
    assert honest == pytest.approx(loss(logits, score, right, wanted).item(), rel=0.01)
    assert scaled_loss(9 * logits, 9 * score, right / 9, wanted) == pytest.approx(honest, rel=1e-3)
    assert honest < scaled_loss(torch.randn(500, 3), score, right, wanted)


def test_calibration_recovers_what_was_applied() -> None:
    torch.manual_seed(0)
    trunk, bag = torch.randn(8000, 4) * 2, torch.randn(8000, 7)
    true = torch.distributions.Categorical(logits=(trunk + (0.5 + 0.3 * bag[:, -1:]) * bag[:, :4]) / 3).sample()
    score = torch.randn(8000, 1) * 2
    hard = sampled(0.5 * score[:, 0] + 0.8 * bag[:, 4] - 0.5)
    found = calibrate(trunk, score, bag, Targets(true, hard, torch.zeros(8000, 0)))
    assert found.temperature == pytest.approx(3, rel=0.1)
    assert found.category_words == pytest.approx(0.5, abs=0.1)
    assert found.category_words_by_length == pytest.approx(0.3, abs=0.1)
    assert found.scale == pytest.approx(0.5, rel=0.1)
    assert found.complexity_words == pytest.approx(0.8, rel=0.1)
    assert found.bias == pytest.approx(-0.5, abs=0.1)


def test_calibration_without_labels_changes_nothing_and_perfect_scores_stay_finite() -> None:
    right = torch.zeros(50, 0)
    missing = torch.full((50,), NONE)
    found = calibrate(
        torch.randn(50, 3), torch.randn(50, 1), torch.randn(50, 4), Targets(torch.full((50,), -100), missing, right)
    )
    assert (found.temperature, found.category_words, found.scale, found.bias) == pytest.approx((1, 0, 1, 0))
    true = torch.arange(50) % 3
    logits = torch.nn.functional.one_hot(true, 3).float()
    found = calibrate(logits, logits[:, :1], torch.zeros(50, 4), Targets(true, logits[:, 0], right))
    assert all(map(math.isfinite, (found.temperature, found.scale, found.bias)))
    assert found.temperature < 0.2


def test_the_abstention_lies_between_those_that_fit_and_those_that_do_not() -> None:
    """Category 2 is "other": whatever is most probable at 0.35 is in truth one of those."""
    sure, unsure = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.35, 0.33, 0.32])
    found = abstention(torch.stack([sure] * 30 + [unsure] * 10), only_category(torch.tensor([0] * 30 + [2] * 10)), 2)
    assert 0.35 < found <= 0.8
    assert abstention(torch.stack([sure, unsure]), only_category(torch.tensor([0, 0])), 2) == 0


def test_an_ability_is_found_from_many_grades() -> None:
    torch.manual_seed(0)
    difficulty = torch.randn(6000, 3)
    true = torch.tensor([1.0, -0.5, 0.0])
    found = ability(difficulty, sampled(difficulty @ true + 0.7), {})
    assert found.weights == pytest.approx(true.tolist(), abs=0.12)
    assert found.bias == pytest.approx(0.7, abs=0.12)
    assert found.prompts == 6000
    predicted = found.right(difficulty)
    assert (predicted - torch.sigmoid(difficulty @ true + 0.7)).abs().max() < 0.1


def test_with_few_grades_an_ability_is_like_those_of_the_others() -> None:
    torch.manual_seed(0)
    others = {name: Ability((1.0 + shift, -1.0 - shift), 5.0, 1000) for name, shift in (("m", 0.2), ("n", -0.2))}
    true = torch.tensor([1.1, -0.9])

    def error(found: Ability) -> float:
        return (torch.tensor(found.weights) - true).abs().max().item()

    near, alone = [], []
    for _ in range(20):
        difficulty = torch.randn(60, 2)
        grades = sampled(difficulty @ true - 0.4)
        near.append(ability(difficulty, grades, others))
        alone.append(ability(difficulty, grades, {}))
    assert sum(map(error, near)) < 0.6 * sum(map(error, alone))
    assert sum(found.bias for found in near) / 20 == pytest.approx(-0.4, abs=0.2)  # free: not drawn towards 5
    none = ability(torch.zeros(4, 2), torch.ones(4), others)  # grades that say nothing of the directions
    assert none.weights == pytest.approx((1, -1), abs=1e-3)
    assert math.isfinite(none.bias)


def test_abilities_leave_out_models_without_grades() -> None:
    torch.manual_seed(0)
    difficulty = torch.randn(400, 2)
    right = torch.stack([sampled(difficulty[:, 0]), torch.full((400,), NONE), sampled(difficulty[:, 0] + 1)], 1)
    right[:100, 0] = NONE
    found = abilities(difficulty, right, ["m", "none", "n"])
    assert {model: known.prompts for model, known in found.items()} == {"m": 300, "n": 400}
    assert found["n"].bias > found["m"].bias
