"""What is fitted on the validation split: probabilities that mean what they say, the abstention, models' abilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.model import Calibration
from training.objective import Targets, loss

OTHER = "other"  # the category of what fits none
FAINT = 1e-3  # pull towards no change, which keeps perfect scores finite
ABILITY_PRIOR = 30.0  # precision of an ability's weights around their prior
FLOOR, CEILING, STEP = 0.1, 0.6, 0.02  # thresholds that are tried for the abstention


@dataclass(frozen=True)
class Ability:
    """P(right | prompt) = sigmoid(weights . difficulty + bias): multidimensional item response (Reckase 2009)."""

    weights: tuple[float, ...]  # [K]
    bias: float
    prompts: int  # that it was fitted on

    def right(self, difficulty: Tensor) -> Tensor:
        """Probabilities [N] for the prompts of `difficulty` [N, K]."""
        return torch.sigmoid(difficulty.double() @ torch.tensor(self.weights, dtype=torch.float64) + self.bias)


def read_abilities(manifest: Mapping[str, Any]) -> dict[str, Ability]:
    """The abilities that the manifest of heads or weights holds."""
    return {
        model: Ability(tuple(ability["weights"]), ability["bias"], ability["prompts"])
        for model, ability in manifest["abilities"].items()
    }


def calibrate(category: Tensor, complexity: Tensor, words: Tensor, wanted: Targets) -> Calibration:
    """Temperature (Guo et al. 2017), Platt scaling and the weights of the words, by maximum likelihood.

    Logits of the trunk, `category` [N, L] and `complexity` [N, 1], and what the words say, `words` [N, >= L + 2], of
    rows not trained on. Convex: the temperature enters as its inverse.
    """
    labels = category.shape[1]
    known, graded = wanted.category >= 0, ~wanted.complexity.isnan()
    trunk, bag, true = category[known].double(), words[known, :labels].double(), wanted.category[known]
    length = words[known, -1:].double()
    of_trunk, of_bag = complexity[graded, 0].double(), words[graded, labels].double()
    soft = wanted.complexity[graded].double()
    start = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)

    def objective(x: Tensor) -> Tensor:
        value = FAINT * (x - start).pow(2).sum()
        if len(true):
            value = value + nn.functional.cross_entropy(trunk * x[0] + bag * (x[1] + x[2] * length), true)
        if len(soft):
            logits = of_trunk * x[3] + of_bag * x[4] + x[5]
            value = value + nn.functional.binary_cross_entropy_with_logits(logits, soft)
        return value

    sharpness, by_words, by_length, scale, complexity_words, bias = _minimised(objective, start).tolist()
    temperature = 1 / max(sharpness, 1e-2)
    return Calibration(
        temperature, by_words * temperature, by_length * temperature, max(scale, 1e-2), complexity_words, bias
    )


def scaled_loss(category: Tensor, complexity: Tensor, right: Tensor, wanted: Targets) -> float:
    """The training loss of logits, each head's scaled as is best for it: calibration will do as much.

    Without that the loss of a later epoch, more often right but surer of itself, would be the higher.
    """

    def objective(scale: Tensor) -> Tensor:
        return loss(category * scale[0], complexity * scale[1], right * scale[2], wanted)

    return objective(_minimised(objective, torch.ones(3))).item()


def abstention(probabilities: Tensor, wanted: Targets, other: int) -> float:
    """The threshold on the highest of `probabilities` [N, L] below which `other` is the better guess; 0 for never."""
    known = wanted.category >= 0
    best, true = probabilities[known].max(1), wanted.category[known]

    def right(below: float) -> float:
        return float((torch.where(best.values < below, other, best.indices) == true).double().mean())

    tried = [FLOOR + STEP * i for i in range(round((CEILING - FLOOR) / STEP) + 1)]
    return max([0.0, *tried], key=lambda below: (round(right(below), 9), -below))


def abilities(difficulty: Tensor, right: Tensor, models: Sequence[str]) -> dict[str, Ability]:
    """The ability of each of the M `models`, from grades `right` [N, M] (nan: none) of prompts of `difficulty` [N, K].

    Fitted twice: first around zero, then around the mean of what came out, as a model that is added later will be.
    """
    around: Mapping[str, Ability] = {}
    for _ in range(2):
        around = {
            model: ability(difficulty[known], right[known, i], around)
            for i, model in enumerate(models)
            if (known := ~right[:, i].isnan()).any()
        }
    return dict(around)


def ability(difficulty: Tensor, grades: Tensor, others: Mapping[str, Ability]) -> Ability:
    """One model's ability from `grades` [N] in 0..1 of prompts of `difficulty` [N, K].

    Maximum a posteriori: the weights are normal around the mean of `others`, so that a few hundred grades suffice; the
    bias is free.
    """
    x, y = difficulty.double(), grades.double()
    prior = torch.zeros(x.shape[1] + 1, dtype=torch.float64)
    if others:
        prior[:-1] = torch.tensor([known.weights for known in others.values()], dtype=torch.float64).mean(0)

    def objective(parameters: Tensor) -> Tensor:
        logits = x @ parameters[:-1] + parameters[-1]
        pull = 0.5 * ABILITY_PRIOR * (parameters - prior)[:-1].pow(2).sum() + FAINT * parameters[-1].pow(2)
        return nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") + pull

    found = _minimised(objective, prior)
    return Ability(tuple(found[:-1].tolist()), float(found[-1]), len(y))


def _minimised(objective: Any, start: Tensor) -> Tensor:
    found = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([found], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value: Tensor = objective(found)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)
    return found.detach()
