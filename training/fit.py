"""Fit the classifier to the training split; choose the epoch and calibrate on the validation split."""

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from training.base import Base
from training.calibration import OTHER, abilities, abstention, calibrate, scaled_loss
from training.compute import device, mixed_precision
from training.heads import Trained, heads_digest, load_heads
from training.lexical import Lexical, fit_lexical
from training.model import Calibration, Classifier, Router, Scores, with_lora
from training.objective import Targets, loss, targets
from training.perturb import typos
from training.rows import Row, Splits, rows_digest
from training.tokens import batches, encode, pad, windows
from training.weights import digest, read_manifest

RATE = 1e-3
SMOOTHING = 0.05
TOKENS = 1024  # of each training batch, padding included
READ = 128  # tokens of a text that training reads: what it is about and how hard shows early, and time is short
MISTYPED = 0.25  # of the texts of a batch, drawn anew each epoch
SLIPS = 0.2  # of the words of those
SCORED = 4096  # of each batch that is only scored
WARM_UP = 20  # batches
PATIENCE = 2  # epochs without a better validation loss before training stops
DIRECTIONS = 8  # of difficulty that the words give
CHECKPOINT = 100  # batches between two

History = list[dict[str, float]]


@dataclass(frozen=True)
class Plan:
    labels: Sequence[str]
    models: Sequence[str]  # graded in the training split
    epochs: int
    seed: int
    window: int  # tokens
    windows: int
    start: Path | None  # heads to start from

    @property
    def read(self) -> int:
        """Tokens of a text that training reads."""
        return min(self.window, READ)


@dataclass
class Progress:
    """Where training is: everything that is needed to go on after a kill."""

    step: int
    history: History
    best: dict[str, Tensor]  # trained weights of the best epoch so far


def unfinished(folder: Path, base: Base, splits: Splits, plan: Plan) -> Path:
    """The file in `folder` that the state of this very training is kept in."""
    before = heads_digest(plan.start) if plan.start else ""
    rows = rows_digest([*splits.train, *splits.validation])
    key = digest(repr((asdict(plan), before, base.digest, rows)).encode())
    return folder / f".unfinished-{key}.pt"


def fit(base: Base, splits: Splits, plan: Plan, checkpoint: Path) -> tuple[Trained, History]:
    """Train, calibrate and return the heads with a record of each epoch.

    Every CHECKPOINT batches, and at the end, the state is kept in the file `checkpoint`; the same call after a kill
    goes on from there. The caller removes it.
    """
    torch.manual_seed(plan.seed)
    wanted = targets(splits.train, plan.labels, plan.models)
    texts = [row.text for row in splits.train]
    ids = encode(base.tokenizer, texts, plan.read)
    print("words: fitting")
    vocabulary = base.trunk.config.vocab_size
    lexical = fit_lexical(ids, wanted, len(plan.labels), DIRECTIONS, vocabulary)
    router = started(base, lexical, plan).to(device())
    lengths = [len(row) for row in ids]
    history = _train(router, texts, lengths, wanted, base.tokenizer, splits.validation, plan, checkpoint)
    return calibrated(router.cpu().eval(), base.tokenizer, splits.validation, plan), history


def started(base: Base, lexical: Lexical, plan: Plan) -> Router:
    """Untrained heads on `base`; or the adapter of the heads in `plan.start`, with those heads that mean the same."""
    before = load_heads(plan.start, base).router.classifier if plan.start else None
    trunk = before.trunk if before else with_lora(base.trunk)
    classifier = Classifier(trunk, base.trunk.config.hidden_size, len(plan.labels), len(plan.models))
    if before and plan.start:
        known = read_manifest(plan.start) or {}
        same = {"complexity", "difficulty"}
        same |= {"category"} if known["labels"] == list(plan.labels) else set()
        same |= {"right"} if known["models"] == list(plan.models) else set()
        for name in sorted(same):
            getattr(classifier, name).load_state_dict(getattr(before, name).state_dict())
    return Router(classifier, lexical, Calibration())


def _train(
    router: Router,
    texts: Sequence[str],
    lengths: Sequence[int],
    wanted: Targets,
    tokenizer: Tokenizer,
    validation: Sequence[Row],
    plan: Plan,
    checkpoint: Path,
) -> History:
    """Train on `texts` of these `lengths` in tokens until the validation loss stops falling; keep the best epoch."""
    classifier = router.classifier
    shuffle = random.Random(plan.seed)  # noqa: S311 (nothing secret)
    epochs = [list(batches(lengths, TOKENS, shuffle)) for _ in range(plan.epochs)]
    ends = {sum(map(len, epochs[: i + 1])) for i in range(len(epochs))}
    steps = [batch for epoch in epochs for batch in epoch]
    trained = {name: parameter for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    rates = get_linear_schedule_with_warmup(optimiser, min(WARM_UP, len(steps) // 10), len(steps))
    parts: dict[str, Any] = {"classifier": classifier, "optimiser": optimiser, "rates": rates}
    progress = _resumed(checkpoint, parts)
    with tqdm(total=len(steps), initial=progress.step, desc="train", unit="batch", mininterval=1) as bar:
        for batch in steps[progress.step :]:
            classifier.train()
            typed = mistyped([texts[i] for i in batch], random.Random(f"{plan.seed} {progress.step}"))  # noqa: S311
            scores, right = _forward(classifier, encode(tokenizer, typed, plan.read))
            value = loss(scores.category, scores.complexity, right, _moved(wanted.at(batch)), SMOOTHING)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            rates.step()
            progress.step += 1
            bar.update()
            if progress.step in ends:
                progress.history.append(_validate(classifier, tokenizer, validation, plan))
                bar.set_postfix({name: f"{value:.3f}" for name, value in progress.history[-1].items()})
                best = min(range(len(progress.history)), key=lambda i: progress.history[i]["loss"])
                if best == len(progress.history) - 1:
                    progress.best = {name: p.detach().clone() for name, p in trained.items()}
                elif len(progress.history) - 1 - best >= PATIENCE:
                    progress.step = len(steps)  # done
            if progress.step in ends or progress.step % CHECKPOINT == 0:
                _keep(checkpoint, progress, parts)
            if progress.step == len(steps):
                break
    classifier.load_state_dict(progress.best, strict=False)
    return progress.history


def calibrated(router: Router, tokenizer: Tokenizer, rows: Sequence[Row], plan: Plan) -> Trained:
    """`router` with everything that is fitted on the validation `rows`."""
    scores, words = score(router, tokenizer, rows, plan)
    wanted = targets(rows, plan.labels, plan.models)
    router.calibration = calibrate(scores.category, scores.complexity, words, wanted)
    category, _ = router.logits(scores, words)
    below = 0.0
    if OTHER in plan.labels:
        below = abstention(category.softmax(-1), wanted, plan.labels.index(OTHER))
    known = abilities(router.hardness(scores, words), wanted.right, plan.models)
    return Trained(router, tuple(plan.labels), tuple(plan.models), below, known, plan.window, plan.windows, {})


@torch.no_grad()
def score(router: Router, tokenizer: Tokenizer, rows: Sequence[Row], plan: Plan) -> tuple[Scores, Tensor]:
    """The trunk's scores of `rows` and what their words say, in float32, all windows read."""
    router.eval()
    cut = windows(tokenizer, [row.text for row in rows], plan.window, plan.windows)
    order = list(batches([len(cut.of([i]).text) * plan.window for i in range(len(rows))], SCORED))
    found: list[tuple[Tensor, ...]] = []
    for batch in order:
        inputs = [tensor.to(device()) for tensor in cut.of(batch).tensors()]
        scores, words = router.classifier(*inputs), router.words(*inputs)
        columns = scores.category, scores.complexity, scores.difficulty, words
        found.append(tuple(column[: len(batch)].float().cpu() for column in columns))
    back = torch.tensor([i for batch in order for i in batch]).argsort()
    category, complexity, difficulty, words = (torch.cat(column)[back] for column in zip(*found, strict=True))
    return Scores(category, complexity, difficulty), words


def mistyped(texts: Sequence[str], draw: random.Random) -> list[str]:
    """`texts`, a share MISTYPED of them as hurried people type."""
    return [typos(text, draw, SLIPS) if draw.random() < MISTYPED else text for text in texts]


def _forward(classifier: nn.Module, ids: Sequence[list[int]]) -> tuple[Scores, Tensor]:
    """Scores [N, ...] and the models' logits [N, M] of N texts of one window each, in float32."""
    input_ids, mask = (tensor.to(device()) for tensor in pad(ids))
    with mixed_precision():
        scores: Scores = classifier(input_ids, mask, torch.arange(len(ids), device=device()))
        right = classifier.right(scores.difficulty)  # type: ignore[operator]
    return Scores(scores.category.float(), scores.complexity.float(), scores.difficulty.float()), right.float()


@torch.no_grad()
def _validate(classifier: nn.Module, tokenizer: Tokenizer, rows: Sequence[Row], plan: Plan) -> dict[str, float]:
    """Loss, as it will be once calibrated, and category accuracy on the first windows of `rows`."""
    classifier.eval()
    wanted = targets(rows, plan.labels, plan.models)
    ids = encode(tokenizer, [row.text for row in rows], plan.window)
    order = list(batches([len(row) for row in ids], SCORED))
    found = [_forward(classifier, [ids[i] for i in batch]) for batch in order]
    category, complexity, right = (
        torch.cat(column).cpu()
        for column in zip(*((scores.category, scores.complexity, right) for scores, right in found), strict=True)
    )
    sorted_wanted = wanted.at([i for batch in order for i in batch])
    known = sorted_wanted.category >= 0
    record = {"loss": scaled_loss(category, complexity, right, sorted_wanted)}
    if known.any():
        hits = category.argmax(1)[known] == sorted_wanted.category[known]
        record["accuracy"] = hits.float().mean().item()
    return record


def _moved(wanted: Targets) -> Targets:
    return Targets(*(tensor.to(device()) for tensor in (wanted.category, wanted.complexity, wanted.right)))


def _keep(path: Path, progress: Progress, parts: dict[str, Any]) -> None:
    """Write the state beside `path`, then put it in its place: a kill leaves the one before."""
    classifier = parts["classifier"]
    names = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    state = {name: part.state_dict() for name, part in parts.items()}
    state["classifier"] = {name: value for name, value in state["classifier"].items() if name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    torch.save({"progress": asdict(progress), "random": torch.get_rng_state(), **state}, beside)
    os.replace(beside, path)


def _resumed(path: Path, parts: dict[str, Any]) -> Progress:
    """The progress kept at `path`, its state loaded into `parts`; a fresh start when there is none."""
    if not path.exists():
        return Progress(0, [], {})
    kept = torch.load(path, weights_only=True)
    parts["classifier"].load_state_dict(kept["classifier"], strict=False)
    parts["optimiser"].load_state_dict(kept["optimiser"])
    parts["rates"].load_state_dict(kept["rates"])
    torch.set_rng_state(kept["random"])
    progress = Progress(**kept["progress"])
    print(f"train: going on after batch {progress.step}")
    return progress
