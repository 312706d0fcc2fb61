"""The replays: labelled questions as streams of requests and as pairs. The same seed makes the same ones."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cache.held_out import Group
from bench.cache.system import Replay, Role, Turn, Verdict

SEED = 20
INTENTS = ("clinc150", "banking77")
QUORA = "qqp_pairs"
QUORA_PAIRS = 5000  # of the 72,682, unless another number of requests is asked for
OUT_OF_SCOPE = "oos"


def replays(data: Path, groups: Sequence[Group], requests: int | None) -> Iterator[Replay]:
    """Those whose data is there, each of at most `requests`."""
    for name in INTENTS:
        if (path := source(data, name)).exists():
            yield intents(name, rows(path), requests)
    if (path := source(data, QUORA)).exists():
        labelled = list(rows(path))
        shuffled = dice().sample(labelled, len(labelled))
        pairs = shuffled[: requests // 2 if requests else QUORA_PAIRS]
        yield quora_stream(pairs, Labels(labelled))
        yield quora_pairs(pairs)
    if groups:
        yield own_pairs(groups, requests)


def dice() -> random.Random:
    """Always the same."""
    return random.Random(SEED)  # noqa: S311 (nothing is secret)


def missing(data: Path) -> list[str]:
    return [name for name in (*INTENTS, QUORA) if not source(data, name).exists()]


def source(data: Path, name: str) -> Path:
    return data / f"{name}.jsonl.gz"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def intents(name: str, labelled: Iterable[dict[str, Any]], requests: int | None) -> Replay:
    """The test split, shuffled: a hit is right when both have the same intent. What has no intent repeats nothing."""
    tested = [row for row in labelled if row["split"] in ("test", "oos_test")]
    dice().shuffle(tested)
    asked, seen = [], set()
    for number, row in enumerate(tested[:requests]):
        answer = f"{OUT_OF_SCOPE}-{number}" if row["intent"] == OUT_OF_SCOPE else row["intent"]
        asked.append(Turn(row["text"], answer, Role.ASK, answer in seen))
        seen.add(answer)
    words = f"test questions of {name}, shuffled; right: served from a question of the same intent"
    return Replay(name, words, [asked], same_answer, "others")


def same_answer(served: Turn, asked: Turn) -> Verdict:
    return Verdict.RIGHT if served.answer == asked.answer else Verdict.WRONG


def quora_stream(pairs: Sequence[dict[str, Any]], labels: Labels) -> Replay:
    """First every `a`, then every `b`, each shuffled; judged is what is served to a `b`."""
    order = dice()
    first, then = [pair["a"] for pair in pairs], [pair["b"] for pair in pairs]
    order.shuffle(first)
    order.shuffle(then)
    seen = {labels.meaning(text) for text in first}
    turns = [Turn(text, labels.meaning(text), Role.WARM, is_repeat=False) for text in first]
    for text in then:
        meaning = labels.meaning(text)
        turns.append(Turn(text, meaning, Role.ASK, meaning in seen))
        seen.add(meaning)
    words = "pairs of Quora questions: first one of each pair, then the other, which is judged"
    return Replay("Quora stream", words, [turns], labels.judge, "others")


def quora_pairs(pairs: Sequence[dict[str, Any]]) -> Replay:
    """Each pair alone: the cache holds `a`, and `b` asks."""
    episodes = [
        [
            Turn(pair["a"], str(number), Role.PUT, is_repeat=False),
            Turn(pair["b"], str(number) if pair["same"] else f"not {number}", Role.PROBE, bool(pair["same"])),
        ]
        for number, pair in enumerate(pairs)
    ]
    words = "the same pairs, each alone: the cache holds one question and the other asks"
    return Replay("Quora pairs", words, episodes, same_answer, "look-alikes")


def own_pairs(groups: Sequence[Group], requests: int | None) -> Replay:
    """The cache holds the questions of all groups; every repeat and every trap asks once, and changes nothing."""
    chosen = list(_up_to(dice().sample(groups, len(groups)), requests))
    stored = [Turn(group.question, group.id, Role.PUT, is_repeat=False) for group in chosen]
    asked = [Turn(text, group.id, Role.PROBE, is_repeat=True) for group in chosen for text in group.same]
    asked += [
        Turn(text, f"{group.id} trap {number}", Role.PROBE, is_repeat=False)
        for group in chosen
        for number, text in enumerate(group.traps)
    ]
    dice().shuffle(asked)
    words = f"the project's own pairs, {len(chosen)} groups held out of training: the cache holds their questions"
    return Replay("own pairs", words, [[*stored, *asked]], same_answer, "traps")


def _up_to(groups: Iterable[Group], requests: int | None) -> Iterator[Group]:
    asked = 0
    for group in groups:
        asked += len(group.same) + len(group.traps)
        if requests and asked > requests:
            return
        yield group


class Labels:
    """What labelled pairs say of any two questions: the pair itself first, then what follows from all pairs together.

    The same as the same is the same. Two questions are different when two that are the same as they were labelled
    different. Whatever does not follow is unknown.
    """

    def __init__(self, pairs: Iterable[dict[str, Any]]) -> None:
        self._parent: dict[str, str] = {}
        self._direct = {frozenset((plain(pair["a"]), plain(pair["b"]))): bool(pair["same"]) for pair in pairs}
        for questions, is_same in self._direct.items():
            if is_same:
                first, *_, last = sorted(questions) * 2
                self._parent[self._root(first)] = self._root(last)
        self._different = {
            frozenset(map(self._root, questions)) for questions, is_same in self._direct.items() if not is_same
        }

    def meaning(self, text: str) -> str:
        """The same for all questions that are known to be the same."""
        return self._root(plain(text))

    def judge(self, served: Turn, asked: Turn) -> Verdict:
        questions = frozenset((plain(served.text), plain(asked.text)))
        meanings = frozenset((served.answer, asked.answer))
        is_same = len(questions) == 1 or self._direct.get(questions, len(meanings) == 1)
        if is_same:
            return Verdict.RIGHT
        return Verdict.WRONG if questions in self._direct or meanings in self._different else Verdict.UNKNOWN

    def _root(self, question: str) -> str:
        while (parent := self._parent.get(question, question)) != question:
            self._parent[question] = self._parent.get(parent, parent)
            question = parent
        return question


def plain(text: str) -> str:
    """A question without the differences in capitals and spaces that make it no other question."""
    return " ".join(text.casefold().split())
