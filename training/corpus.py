"""Plain text to distil on: the project's prompts, the documentation strings of installed packages, a folder given."""

import ast
import json
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

from training.rows import read_rows, tenth

PROMPTS = Path(__file__).parent / "prompts"
DOCUMENTED = 10_000  # paragraphs of documentation strings that are kept, drawn evenly from all that are installed
OWN_TIMES = 4  # that each of the project's prompts is in the corpus: what is distilled is to serve prompts
SHORTEST, LONGEST = 20, 4_000  # characters of a paragraph


def corpus(folder: Path | None, seed: int) -> list[str]:
    """Texts, shuffled; none is a prompt of the project's validation or test tenths.

    Distinct but for the project's prompts, each of which is there OWN_TIMES.
    """
    rows = read_rows(PROMPTS)
    own, held_out = {row.text for row in rows}, {row.text for row in rows if tenth(row.template or row.text) >= 8}
    documented = sorted({text for text in documentation() if ">>>" not in text})
    draw = random.Random(seed)  # noqa: S311 (nothing secret)
    documented = draw.sample(documented, min(DOCUMENTED, len(documented)))
    others = {*documented, *(given(folder) if folder else ())} - own
    texts = sorted(others) + sorted(own - held_out) * OWN_TIMES
    draw.shuffle(texts)
    return texts


def given(folder: Path) -> Iterator[str]:
    """Texts under `folder`: the `text` of each line of its .jsonl files, the paragraphs of its .txt and .md files."""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in file.read_text("utf-8").split("\n") if line.strip())
        elif file.suffix in (".txt", ".md"):
            yield from paragraphs(file.read_text("utf-8", errors="replace"))


def documentation() -> Iterator[str]:
    """Paragraphs of the documentation strings of every installed package, in no order that matters."""
    for distribution in distributions():
        for file in distribution.files or ():
            if file.suffix == ".py" and "test" not in str(file):
                yield from _docstrings(Path(str(distribution.locate_file(file))))


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text` that are of a usable length, their lines joined."""
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        if SHORTEST <= len(joined) <= LONGEST:
            yield joined


def _docstrings(path: Path) -> Iterable[str]:
    try:
        source = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):  # not ours to mend
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            yield from paragraphs(docstring)
