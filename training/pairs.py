"""Labelled pairs of questions: groups written for this project, and which of them train, choose and report.

A group is one question, others that the very same answer serves, and traps: others that look alike and need another.
How they are written stands in pairs/GUIDE.md.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.perturb import typos
from training.rows import BadRows, normalised, tenth
from training.weights import digest

PAIRS = Path(__file__).parent / "pairs"
SLIPPED, SLIPS = 0.15, 0.15  # of the questions that training reads, and of the words of those: typing mistakes


@dataclass(frozen=True)
class Trap:
    text: str
    kind: str  # negation, number ...: what makes the difference


@dataclass(frozen=True)
class Group:
    question: str
    same: tuple[str, ...]  # that its answer serves, too
    traps: tuple[Trap, ...]
    source: str = ""  # the file it was read from

    @property
    def texts(self) -> list[str]:
        return [self.question, *self.same, *(trap.text for trap in self.traps)]


@dataclass(frozen=True)
class Pair:
    question: str  # that is asked
    cached: str  # that was answered
    same: bool  # the answer serves
    kind: str = ""  # of the trap, or "same"


@dataclass(frozen=True)
class GroupSplits:
    train: list[Group]
    validation: list[Group]  # chooses the epoch, calibrates, and gives the thresholds
    test: list[Group]  # is only reported


def read_groups(paths: Iterable[Path]) -> list[Group]:
    """The groups in JSONL files, or in all such files of folders. Raises BadRows."""
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    groups: list[Group] = []
    problems: list[str] = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                found = _group(line, file.stem)
                groups += [found] if isinstance(found, Group) else []
                problems += [f"{file}:{number}: {found}"] if isinstance(found, str) else []
    if problems or not groups:
        raise BadRows(problems or ["there are no groups of pairs"])
    return groups


def _group(line: str, source: str) -> Group | str:
    """The group in a line, or what is wrong with it."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return f"is not valid JSON: {error}"
    match record:
        case {"question": str(question), "same": list(same), "traps": list(traps)}:
            texts: list[Any] = [question, *same, *(isinstance(t, dict) and t.get("text") for t in traps)]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                return "question, same and the texts of traps must be strings that are not empty"
            group = Group(question, tuple(same), tuple(Trap(t["text"], str(t.get("kind", ""))) for t in traps), source)
            if {trap.text for trap in group.traps} & {question, *same}:
                return "a text is the same and a trap"
            return group
    return "must have question, same (a list of texts) and traps (a list of objects with text and kind)"


def split(groups: Sequence[Group]) -> GroupSplits:
    """Eight tenths to train on, a tenth each to choose by and to report, by the question's `tenth`.

    A group that shares a text with one that is held out further is left out.
    """
    parts: list[list[Group]] = [[], [], []]
    for group in groups:
        parts[max(tenth(group.question) - 7, 0)].append(group)
    taken: set[str] = set()
    for part in reversed(parts):
        texts = {normalised(text) for group in part for text in group.texts}
        part[:] = [group for group in part if taken.isdisjoint(map(normalised, group.texts))]
        taken |= texts
    return GroupSplits(*parts)


def asked(groups: Iterable[Group]) -> list[Pair]:
    """What is measured: each question is in the cache, and what it has beside it is asked."""
    pairs: list[Pair] = []
    for group in groups:
        pairs += [Pair(text, group.question, True, "same") for text in group.same]
        pairs += [Pair(trap.text, group.question, False, trap.kind) for trap in group.traps]
    return pairs


def lessons(groups: Iterable[Group], draw: random.Random) -> list[Pair]:
    """An epoch of training pairs, drawn anew: in either order, some mistyped.

    What is the same is so among itself, and a trap is one for all of it. Of traps nobody said that they differ.
    """
    pairs: list[Pair] = []
    for group in groups:
        texts = [group.question, *group.same]
        pairs += [Pair(one, other, True, "same") for i, one in enumerate(texts) for other in texts[:i]]
        traps = [Pair(trap.text, group.question, False, trap.kind) for trap in group.traps]
        others = [Pair(trap.text, text, False, trap.kind) for trap in group.traps for text in group.same]
        pairs += traps + draw.sample(others, min(len(others), len(traps)))
    return [_drawn(pair, draw) for pair in pairs]


def _drawn(pair: Pair, draw: random.Random) -> Pair:
    one, other = (
        typos(text, draw, SLIPS) if draw.random() < SLIPPED else text for text in (pair.question, pair.cached)
    )
    return Pair(one, other, pair.same, pair.kind) if draw.random() < 0.5 else Pair(other, one, pair.same, pair.kind)


def groups_digest(groups: Iterable[Group]) -> str:
    """Name a set of groups by what they say, whatever their order."""
    said = sorted(json.dumps([group.question, group.same, [trap.text for trap in group.traps]]) for group in groups)
    return digest("\n".join(said).encode())
