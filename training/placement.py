"""Place a model on the scale of abilities from graded answers, without retraining: `make calibrate`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from training.calibration import Ability, ability, read_abilities
from training.served import Served
from training.sources import read
from training.weights import write_manifest

FEWEST = 50  # graded answers


class TooFewGrades(Exception):
    """There are not enough graded answers to tell a model's ability from."""


def place(weights: Path, model: str, data: Sequence[str]) -> None:
    """Fit the ability of `model` to the rows of `data` that grade it and add it to the manifest of `weights`.

    Prints how well the prediction does on a fifth of the rows it is not fitted to, then fits to all of them.
    Raises BadRows, NoWeights or TooFewGrades.
    """
    rows = [row for row in read(data) if model in row.correct]
    if len(rows) < FEWEST:
        raise TooFewGrades(
            f"{', '.join(data)}: {len(rows)} answers of {model} are graded; at least {FEWEST} are needed"
        )
    served = Served(weights)
    difficulty = torch.from_numpy(served.read([row.text for row in rows], progress="read").difficulty)
    grades = torch.tensor([float(row.correct[model]) for row in rows])
    others = {name: known for name, known in read_abilities(served.manifest).items() if name != model}
    print(_check(difficulty, grades, others))
    abilities = {**served.manifest["abilities"], model: asdict(ability(difficulty, grades, others))}
    write_manifest(weights, {**served.manifest, "abilities": abilities})
    print(f"{model}: right on {grades.mean():.1%} of {len(rows)} prompts; written to {weights / 'manifest.json'}")
    print("restart the gateway to use it; a classifier trained anew has another scale and needs this again")


def _check(difficulty: Tensor, grades: Tensor, others: Mapping[str, Ability]) -> str:
    """How the prediction does on a fifth of the rows, fitted to the others, beside always saying the mean."""
    order = list(range(len(grades)))
    Random(0).shuffle(order)  # noqa: S311 (nothing secret)
    held, used = order[: len(order) // 5], order[len(order) // 5 :]
    predicted = ability(difficulty[used], grades[used], others).right(difficulty[held])
    error, plain = (float((p - grades[held]).square().mean()) for p in (predicted, grades[used].mean()))
    return f"squared error on {len(held)} held-out answers: {error:.3f}; of their mean alone: {plain:.3f}"
