"""Public benchmarks as labelled rows: `python -m training benchmarks --data FOLDER --to benchmarks.jsonl`.

Reads `mmlu_pro.jsonl.gz` (question, category, split, which of 29 models got it right) and `routellm_mmlu.jsonl.gz`
(prompt, subject, whether Mixtral-8x7B and GPT-4 got it right). Most of MMLU-Pro comes from MMLU, so that a question of
both goes to the split MMLU-Pro puts it in. Nothing of these sets is part of the project; weights trained on them are.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.rows import BadRows, normalised, tenth

FILES = ("mmlu_pro.jsonl.gz", "routellm_mmlu.jsonl.gz")
SUBJECTS = {
    "biology": "college_biology high_school_biology",
    "business": "business_ethics management marketing",
    "chemistry": "college_chemistry high_school_chemistry",
    "computer science": "college_computer_science computer_security high_school_computer_science machine_learning",
    "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
    "engineering": "electrical_engineering",
    "health": "anatomy clinical_knowledge college_medicine human_aging medical_genetics nutrition professional_medicine"
    " virology",
    "history": "high_school_european_history high_school_us_history high_school_world_history prehistory",
    "law": "international_law jurisprudence professional_law",
    "math": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics"
    " high_school_statistics",
    "other": "global_facts high_school_geography high_school_government_and_politics human_sexuality miscellaneous"
    " professional_accounting public_relations security_studies sociology us_foreign_policy",
    "philosophy": "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy world_religions",
    "physics": "astronomy college_physics conceptual_physics high_school_physics",
    "psychology": "high_school_psychology professional_psychology",
}
CATEGORY = {subject: category for category, subjects in SUBJECTS.items() for subject in subjects.split()}
BROKEN = "high_school_mathematics"  # GPT-4 is recorded right on 3 % of it: its grades are left out
WEAK, STRONG = "RouteLLM Mixtral-8x7B", "RouteLLM GPT-4"
PAIRS = (
    ("Mixtral-8x7B-Instruct-v0.1", "gpt-4o-2024-05"),
    ("Meta-Llama-3_1-8B-Instruct", "Meta-Llama-3_1-70B-Instruct"),
    (WEAK, STRONG),
)
LICENCES = {
    "prompts": "Apache-2.0 (written for this project)",
    "MMLU-Pro": "MIT (questions), Apache-2.0 (models' answers)",
    "RouteLLM MMLU": "MIT (questions), Apache-2.0 (models' answers)",
}


def write_benchmarks(folder: Path, out: Path) -> int:
    """Write the rows of both sets in `folder` to the JSONL file `out`; return how many.

    Raises BadRows when a set is missing or not in that form.
    """
    try:
        rows = list(benchmark_rows(folder))
    except (OSError, EOFError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BadRows([f"{folder}: {' or '.join(FILES)} cannot be read: {error!r}"]) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def benchmark_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """MMLU-Pro's rows, then RouteLLM's; each with the split it must stay in."""
    splits: dict[str, str] = {}
    for row in _read(folder / FILES[0]):
        question = row["question"]
        splits[normalised(question)] = split = "test" if row["split"] == "test" else _kept(question)
        correct = {model: grade for model, grade in row["correct"].items() if grade is not None}
        yield {
            "text": question,
            "category": row["category"],
            "correct": correct,
            "split": split,
            "source": "MMLU-Pro",
        }
    for row in _read(folder / FILES[1]):
        prompt, subject = row["prompt"].removesuffix("\nAnswer:"), row["subject"]
        question = re.split(r"\nA\. ", prompt)[0]
        graded = {WEAK: int(row["weak"]), STRONG: int(row["strong"])} if subject != BROKEN else {}
        yield {
            "text": prompt,
            "category": CATEGORY[subject],
            "correct": graded,
            "split": splits.get(normalised(question)) or ("test" if tenth(question) == 9 else _kept(question)),
            "source": "RouteLLM MMLU",
        }


def _kept(question: str) -> str:
    """A tenth of what is not test chooses and calibrates."""
    return "validation" if tenth(question) == 8 else "train"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
