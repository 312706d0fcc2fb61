"""The project's own pairs that nothing was trained on, and nothing chosen by."""

from __future__ import annotations

from dataclasses import dataclass

from training.pairs import PAIRS, read_groups, split


@dataclass(frozen=True, slots=True)
class Group:
    """A question, what its answer also serves, and what looks alike and needs another: training/pairs/GUIDE.md."""

    id: str
    question: str
    same: list[str]
    traps: list[str]


def held_out() -> list[Group]:
    """The test groups of `make train-verifier`."""
    return [
        Group(f"{group.source}-{i}", group.question, list(group.same), [trap.text for trap in group.traps])
        for i, group in enumerate(split(read_groups([PAIRS])).test)
    ]
