"""The whole of `make train-verifier`: groups -> base -> fit -> thresholds -> export -> report."""

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from training.base import Base, load_base
from training.compute import device, mixed_precision
from training.model import merged
from training.pairs import GroupSplits, Pair, asked, groups_digest, lessons, read_groups, split
from training.rows import BadRows
from training.thresholds import SIMILARITY_WEIGHT, Labels, Scores, points, verification, weighed
from training.tokens import batches
from training.verifier import (
    Encoded,
    TrainedVerifier,
    Verifier,
    adapted,
    encode_pairs,
    load_verifier,
    rounded,
    save_verifier,
)
from training.verifier_report import write_report
from training.verifier_served import ServedVerifier, export_verifier, similarities
from training.weights import appearing, read_manifest, sweep, write_manifest

RUNS = Path("runs")
RATE, HEAD_RATE = 1e-3, 1e-3
FURTHER = 0.6  # of the rates, where a verifier is trained further
TOKENS = 2048  # of each training batch, padding included
SCORED = 8192  # of each batch that is only scored
WARM_UP = 50  # batches
SMOOTHED = 0.02  # of certainty that a label is right: a few are not
INT8_MAY_COST = 0.01  # of the repeats served at an error rate of 1 %


@dataclass(frozen=True)
class Settings:
    data: tuple[Path, ...]
    base: str
    repository: Path
    epochs: int
    seed: int
    start: Path | None = None  # a verifier to train further


def train_verifier(settings: Settings) -> Path:
    """Train, fit thresholds, export and report; return the folder of the run.

    Raises BadRows, BaseError, ParityError.
    """
    began = time.monotonic()
    sweep(RUNS)
    if not settings.epochs and settings.start is None:
        raise BadRows(["without an epoch (--epochs 0) there must be a verifier to start from (--start)"])
    splits = split(read_groups(settings.data))
    if not splits.train or not splits.validation:
        raise BadRows([f"{len(splits.train)} groups to train on and {len(splits.validation)} to choose by: too few"])
    sizes = [len(part) for part in (splits.train, splits.validation, splits.test)]
    print("data: {} groups to train on, {} to choose by, {} to report".format(*sizes))
    base = load_base(settings.base)
    verifier, history = fit(base, splits, settings)
    facts: dict[str, Any] = {
        "groups": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        "data_digest": groups_digest([*splits.train, *splits.validation, *splits.test]),
        "epochs": settings.epochs,
        "seed": settings.seed,
        "started_from": _origin(settings.start),
    }
    trained = with_thresholds(TrainedVerifier(verifier, facts), base, splits)
    run = RUNS / time.strftime("%Y%m%d-%H%M%S-verifier")
    with appearing(run) as folder:
        save_verifier(folder / "verifier", trained, base)
        publish_verifier(trained, base, settings.repository)
        weights = settings.repository / "verifier" / "weights"
        write_report(weights, splits, folder, history)
        write_manifest(folder, {"seconds": round(time.monotonic() - began)})
    print(f"report: {run / 'report.md'}")
    return run


def _origin(start: Path | None) -> dict[str, Any] | None:
    """What made the verifier that training starts from."""
    before = read_manifest(start) if start else None
    return before and {key: before.get(key) for key in ("groups", "data_digest", "epochs", "started_from")}


def fit(base: Base, splits: GroupSplits, settings: Settings) -> tuple[Verifier, list[dict[str, float]]]:
    """The verifier of the best epoch on the validation pairs, and what each epoch came to."""
    torch.manual_seed(settings.seed)
    draw = random.Random(settings.seed)  # noqa: S311 (nothing secret)
    tokenizer, width = base.tokenizer, base.trunk.config.hidden_size
    if settings.start is None:
        verifier, slower = Verifier(adapted(base), width).to(device()), 1.0
    else:
        verifier, slower = load_verifier(settings.start, base).verifier.to(device()), FURTHER
        verifier.scale, verifier.bias = torch.tensor(1.0).to(device()), torch.tensor(0.0).to(device())
    plan = list(_epochs(tokenizer, splits, settings.epochs, draw))
    judged = asked(splits.validation)
    parts = dict(verifier.named_parameters())
    head = [p for name, p in parts.items() if not name.startswith("trunk.")]
    trunk = [p for name, p in parts.items() if name.startswith("trunk.") and p.requires_grad]
    learnt: list[dict[str, Any]] = [{"params": trunk}, {"params": head, "lr": slower * HEAD_RATE}]
    optimiser = torch.optim.AdamW(
        learnt,
        lr=slower * RATE,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    steps = sum(len(order) for _, _, order in plan)
    rates = get_linear_schedule_with_warmup(optimiser, min(WARM_UP, steps // 10), steps)
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    with tqdm(total=steps, desc="train", unit="batch", mininterval=1) as bar:
        for encoded, wanted, order in plan:
            verifier.train()
            for batch in order:
                with mixed_precision():
                    said = verifier(*(tensor.to(device()) for tensor in encoded.tensors(batch)))[:, 0]
                target = SMOOTHED + (1 - 2 * SMOOTHED) * wanted[batch].to(device())
                nn.functional.binary_cross_entropy_with_logits(said.float(), target).backward()
                nn.utils.clip_grad_norm_([*trunk, *head], 1.0)
                optimiser.step()
                optimiser.zero_grad()
                rates.step()
                bar.update()
            history.append(_figures(score(verifier, tokenizer, judged), judged))
            bar.set_postfix({name: f"{value:.3f}" for name, value in history[-1].items()})
            if history[-1]["auc"] >= max(each["auc"] for each in history):
                best = {name: p.detach().clone() for name, p in parts.items() if p.requires_grad}
    verifier.load_state_dict(best, strict=False)
    return rounded(verifier.cpu().eval()), history


def _epochs(
    tokenizer: Tokenizer, splits: GroupSplits, epochs: int, draw: random.Random
) -> Iterator[tuple[Encoded, Tensor, list[list[int]]]]:
    """Pairs, whether they are the same [N], and in which batches they come, of each epoch."""
    for _ in range(epochs):
        pairs = lessons(splits.train, draw)
        encoded = encode_pairs(tokenizer, pairs)
        order = list(batches(encoded.lengths, TOKENS, draw))
        yield encoded, torch.tensor([float(pair.same) for pair in pairs]), order


@torch.no_grad()
def score(verifier: Verifier, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Scores:
    """Log-odds [N] of pairs."""
    verifier.eval()
    encoded = encode_pairs(tokenizer, pairs)
    scores = np.zeros(len(pairs))
    for batch in batches(encoded.lengths, SCORED):
        with mixed_precision():
            said = verifier(*(tensor.to(device()) for tensor in encoded.tensors(batch)))
        scores[batch] = said[:, 0].float().cpu().numpy()
    return scores


def labels(pairs: Sequence[Pair]) -> Labels:
    return np.array([pair.same for pair in pairs], dtype=bool)


def _figures(scores: Scores, pairs: Sequence[Pair]) -> dict[str, float]:
    same = labels(pairs)
    traps = np.sort(scores[~same])[::-1]
    served = float((scores[same] > traps[len(traps) // 100]).mean())
    return {"auc": float(roc_auc_score(same, scores)), "repeats_at_1%_of_traps": served}


def with_thresholds(trained: TrainedVerifier, base: Base, splits: GroupSplits) -> TrainedVerifier:
    """Calibrated, in the precision to serve on a CPU, and with the thresholds that its scores have there.

    What the similarity takes from the scores is on average given back. All on the validation pairs; int8 when it costs
    no more than INT8_MAY_COST of the repeats.
    """
    pairs = asked(splits.validation)
    same, near = labels(pairs), similarities(pairs)
    verifier = trained.verifier
    with TemporaryDirectory() as scratch:
        folder = _exported(trained, base, Path(scratch), "float32", {})
        plain = ServedVerifier(folder).scores(pairs)
        scale, bias = platt(plain, same)
        given_back = SIMILARITY_WEIGHT * float((1 - near).mean())
        verifier.scale, verifier.bias = torch.tensor(scale), torch.tensor(bias + given_back)
        forms: dict[str, tuple[Scores, float]] = {}
        for precision in ("float32", "int8"):
            served = ServedVerifier(_exported(trained, base, Path(scratch), precision, {}))
            scores = weighed(served.scores(pairs), near, SIMILARITY_WEIGHT)
            forms[precision] = scores, _repeats_at(scores, same, 0.01)
    precision = "int8" if forms["float32"][1] - forms["int8"][1] <= INT8_MAY_COST else "float32"
    try:
        found = verification(forms[precision][0], near, same)
    except ValueError as error:
        raise BadRows([f"{error}: {int(same.sum())} repeats and {int((~same).sum())} traps to choose by"]) from error
    return TrainedVerifier(verifier, {**trained.facts, "precision": precision, "verification": found})


def _repeats_at(scores: Scores, same: Labels, rate: float) -> float:
    found = points(scores, same, [rate])
    return found[0].repeats if found else 0.0


def platt(scores: Scores, same: NDArray[np.bool_]) -> tuple[float, float]:
    """Scale and bias that make log-odds of scores, where repeats and traps come equally often."""
    read = np.isfinite(scores)
    model = LogisticRegression(C=1e6, class_weight="balanced").fit(scores[read, None], same[read])
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def publish_verifier(trained: TrainedVerifier, base: Base, repository: Path) -> str:
    """Export to `verifier` in `repository`; return the fingerprint. Raises ParityError.

    In the precision that was chosen for a CPU; where there is a GPU, in float16.
    """
    precision = "float16" if device().type == "cuda" else str(trained.facts["precision"])
    made = {"base": base.name, **trained.facts, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    folder = _exported(trained, base, repository, precision, made)
    return str((read_manifest(folder) or {})["fingerprint"])


def _exported(trained: TrainedVerifier, base: Base, repository: Path, precision: str, made: dict[str, Any]) -> Path:
    whole = merged(copy.deepcopy(trained.verifier).cpu()).eval()
    export_verifier(whole, base.tokenizer, repository / "verifier", made, precision)
    return repository / "verifier" / "weights"


def report_verifier(repository: Path, data: Sequence[Path], public: Path | None) -> Path:
    """Measure what `repository` serves on the test groups of `data`; return the folder with the report."""
    run = RUNS / time.strftime("%Y%m%d-%H%M%S-evaluate-verifier")
    with appearing(run) as folder:
        write_report(repository / "verifier" / "weights", split(read_groups(data)), folder, public=public)
    print((run / "report.md").read_text())
    print(f"report: {run / 'report.md'}")
    return run
