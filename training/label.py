"""Propose labels for unlabelled prompts with the present heads, for a person to review: `make label`."""

import json
from pathlib import Path

from training.rows import HALF_PAIR, BadRows
from training.served import Served
from training.weights import write_text

UNSURE = 0.5


def label(weights: Path, prompts: Path, to: Path) -> None:
    """Write a row for each prompt in the file `prompts` to the JSONL file `to`, the least certain first.

    `confidence` is the probability of the category proposed. Raises NoWeights, and BadRows for a file without prompts.
    """
    texts = read_prompts(prompts)
    served = Served(weights)
    found = served.read(texts, progress="label")
    rows = [
        {
            "text": text,
            "category": served.labels[scores.argmax()],
            "complexity": round(float(complexity), 3),
            "confidence": round(float(scores.max()), 3),
        }
        for text, scores, complexity in zip(texts, found.category, found.complexity, strict=True)
    ]
    rows.sort(key=lambda row: row["confidence"])
    write_text(to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    unsure = sum(row["confidence"] < UNSURE for row in rows)
    print(f"{to}: {len(rows)} prompts; of {unsure} the category is less than {UNSURE:.0%} certain: review those first")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file (a line each) or of a JSONL file (the field `text`), without repeated ones."""
    try:
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
        texts = [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadRows([f"{path}: cannot be read: {error!r}"]) from error
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRows([f"{path}: holds no prompts, or some that are empty"])
    if broken := [number for number, text in enumerate(texts, start=1) if HALF_PAIR.search(text)]:
        raise BadRows([f"{path}: prompt {number} holds half a surrogate pair" for number in broken])
    return list(dict.fromkeys(texts))
