"""The whole of `make train`: rows -> splits -> base -> fit -> calibrate -> evaluate -> export."""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from training.base import load_base
from training.evaluate import Calibration, baselines, calibrate, figures, loss, table, targets
from training.export import export
from training.model import Calibrated, Classifier, merged, with_lora
from training.rows import Row, Splits, labels, read_rows, rows_digest, split
from training.tokens import batches, encode, pad
from training.weights import appearing, write_json, write_manifest

RUNS = Path("runs")
RATE = 1e-3
SMOOTHING = 0.05
TOKENS = 1024  # of each training batch, padding included
PATIENCE = 2  # epochs without a better validation loss before training stops


@dataclass(frozen=True)
class Settings:
    data: Path
    base: str
    repository: Path
    epochs: int
    seed: int
    max_tokens: int
    distil_steps: int


def train(settings: Settings) -> Path:
    """Train, measure and export the classifier; return the folder of the run.

    Raises BadRows, BaseError or ParityError; then nothing in the repository has changed.
    """
    start = time.monotonic()
    rows = read_rows(settings.data)
    splits, names = split(rows), labels(rows)
    print(f"data: {settings.data}, {len(rows)} rows, {len(names)} categories")
    base = load_base(settings.base, settings.distil_steps, settings.seed)
    torch.manual_seed(settings.seed)
    classifier = Classifier(with_lora(base.trunk), base.trunk.config.hidden_size, len(names))
    history = fit(classifier, base.tokenizer, splits, names, settings)
    calibrated, metrics = measure(merged(classifier).eval(), base.tokenizer, splits, names, settings)
    fingerprint = export(
        calibrated,
        ["category", "complexity"],
        base.tokenizer,
        settings.repository / "classifier",
        {
            "base": settings.base,
            "labels": names,
            "temperature": calibrated.calibration.temperature,
            "complexity_calibration": {"scale": calibrated.calibration.scale, "bias": calibrated.calibration.bias},
            "max_tokens": settings.max_tokens,
            "metrics": metrics["test"],
            "data_digest": rows_digest(rows),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    run = RUNS / time.strftime("%Y%m%d-%H%M%S")
    with appearing(run) as folder:
        write_json(folder / "config.json", asdict(settings))
        write_json(folder / "metrics.json", {**metrics, "epochs": history})
        write_manifest(folder, {"fingerprint": fingerprint, "seconds": round(time.monotonic() - start)})
    return run


def fit(
    classifier: Classifier, tokenizer: Tokenizer, splits: Splits, names: Sequence[str], settings: Settings
) -> list[dict[str, float]]:
    """Train until the validation loss stops falling, keep the best epoch's weights; return a record of each epoch."""
    ids, wanted = (
        encode(tokenizer, [row.text for row in splits.train], settings.max_tokens),
        targets(splits.train, names),
    )
    shuffle = random.Random(settings.seed)  # noqa: S311 (nothing secret)
    epochs = [list(batches([len(row) for row in ids], TOKENS, shuffle)) for _ in range(settings.epochs)]
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    rates = get_linear_schedule_with_warmup(optimiser, 10, sum(map(len, epochs)))
    history: list[dict[str, float]] = []
    kept: dict[str, Tensor] = {}
    with tqdm(total=sum(map(len, epochs)), desc="train", unit="batch") as progress:
        for epoch in epochs:
            classifier.train()
            for batch in epoch:
                category, complexity = classifier(*pad([ids[i] for i in batch]))
                value = loss(category, complexity, wanted.at(batch), SMOOTHING)
                value.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimiser.step()
                optimiser.zero_grad()
                rates.step()
                progress.update()
            history.append(_validate(classifier, tokenizer, splits.validation, names, settings.max_tokens))
            progress.set_postfix({name: f"{value:.3f}" for name, value in history[-1].items()})
            best = min(range(len(history)), key=lambda i: history[i]["loss"])
            if best == len(history) - 1:
                kept = {name: p.detach().clone() for name, p in classifier.named_parameters() if p.requires_grad}
            elif len(history) - 1 - best >= PATIENCE:
                break
    classifier.load_state_dict(kept, strict=False)
    return history


def measure(
    classifier: Classifier, tokenizer: Tokenizer, splits: Splits, names: Sequence[str], settings: Settings
) -> tuple[Calibrated, dict[str, Any]]:
    """Calibrate on the validation split and report on the test split: the calibrated model and its metrics."""
    validation = scores(classifier, tokenizer, splits.validation, settings.max_tokens)
    calibration = calibrate(*validation, targets(splits.validation, names))
    category, complexity = scores(classifier, tokenizer, splits.test, settings.max_tokens)
    wanted = targets(splits.test, names)
    raw = figures(category, complexity, wanted, Calibration())
    test = figures(category, complexity, wanted, calibration)
    beside = baselines(splits, names)
    print(table({**beside, f"ModernBERT ({settings.base}), LoRA": test}, len(splits.test)))
    return Calibrated(classifier, calibration).eval(), {
        "rows": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        "test": asdict(test),
        "test_before_calibration": asdict(raw),
        "baselines": {name: asdict(found) for name, found in beside.items()},
    }


@torch.no_grad()
def scores(classifier: Classifier, tokenizer: Tokenizer, rows: Sequence[Row], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Category logits [N, L] and complexity logits [N, 1] of `rows`, in their order."""
    classifier.eval()
    ids = encode(tokenizer, [row.text for row in rows], max_tokens)
    order = list(batches([len(row) for row in ids], 4 * TOKENS))
    parts = [classifier(*pad([ids[i] for i in batch])) for batch in order]
    back = torch.tensor([i for batch in order for i in batch]).argsort()
    category, complexity = (torch.cat(columns)[back] for columns in zip(*parts, strict=True))
    return category, complexity


def _validate(
    classifier: Classifier, tokenizer: Tokenizer, rows: Sequence[Row], names: Sequence[str], max_tokens: int
) -> dict[str, float]:
    category, complexity = scores(classifier, tokenizer, rows, max_tokens)
    wanted = targets(rows, names)
    return {
        "loss": loss(category, complexity, wanted).item(),
        "accuracy": figures(category, complexity, wanted, Calibration()).accuracy,
    }
