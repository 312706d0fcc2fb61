"""Groups of questions: what is read, how they are split, and what becomes pairs."""

import json
import random
from pathlib import Path

import pytest

from training.pairs import PAIRS, Group, Pair, Trap, asked, groups_digest, lessons, read_groups, split
from training.rows import BadRows, normalised, tenth


def group(question: str, same: tuple[str, ...] = (), traps: tuple[str, ...] = ()) -> Group:
    return Group(question, same, tuple(Trap(text, "entity") for text in traps))


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 (nothing secret)


def written(folder: Path, *lines: object) -> Path:
    path = folder / "groups.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


GOOD = {"question": "Why?", "same": ["How come?"], "traps": [{"kind": "aspect", "text": "When?"}]}


def test_what_is_read(tmp_path: Path) -> None:
    (found,) = read_groups([written(tmp_path, GOOD, "")])
    assert found == Group("Why?", ("How come?",), (Trap("When?", "aspect"),), "groups")
    assert read_groups([tmp_path]) == [found]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must have question"),
        ({**GOOD, "same": "How come?"}, "must have question"),
        ({**GOOD, "same": [""]}, "must be strings that are not empty"),
        ({**GOOD, "traps": [{"kind": "aspect"}]}, "must be strings that are not empty"),
        ({**GOOD, "traps": ["When?"]}, "must be strings that are not empty"),
        ({**GOOD, "traps": [{"kind": "aspect", "text": "How come?"}]}, "the same and a trap"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, line: object, words: str) -> None:
    path = written(tmp_path, GOOD, line)
    with pytest.raises(BadRows, match=f"{path}:2: .*{words}"):
        read_groups([path])


def test_no_groups_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match="no groups"):
        read_groups([tmp_path])


def test_the_shipped_groups_are_many_and_none_is_in_two_splits() -> None:
    groups = read_groups([PAIRS])
    assert len(groups) > 4000
    parts = split(groups)
    kept = [*parts.train, *parts.validation, *parts.test]
    assert len(kept) > 0.97 * len(groups)
    texts = [{normalised(text) for each in part for text in each.texts} for part in (parts.train, parts.validation)]
    held_out = {normalised(text) for each in parts.test for text in each.texts}
    assert not texts[0] & texts[1]
    assert not (texts[0] | texts[1]) & held_out
    assert {tenth(each.question) for each in parts.test} == {9}
    assert {tenth(each.question) for each in parts.validation} == {8}


def test_a_group_that_shares_a_text_with_one_held_out_further_is_left_out() -> None:
    questions = {
        part: next(f"question {i}" for i in range(999) if tenth(f"question {i}") == part) for part in (1, 8, 9)
    }
    shared = [group(questions[1], ("A text!",)), group(questions[8], ("a TEXT",)), group(questions[9], (), ("a text",))]
    parts = split(shared)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (0, 0, 1)


def test_what_is_asked() -> None:
    assert asked([group("q", ("s",), ("t",))]) == [Pair("s", "q", True, "same"), Pair("t", "q", False, "entity")]


def test_lessons_hold_every_repeat_of_a_group_and_no_two_traps() -> None:
    found = lessons([group("question one", ("same two", "same three"), ("trap four", "trap five"))], dice(2))

    def words(pair: Pair) -> frozenset[str]:
        return frozenset(text[:4] for text in (pair.question, pair.cached))

    assert sum(pair.same for pair in found) == 3
    assert sum(not pair.same for pair in found) == 4
    assert all("trap" not in " ".join(words(pair)) or not pair.same for pair in found)
    assert frozenset({"trap"}) not in map(words, found)


def test_an_epoch_is_drawn_anew_and_the_same_from_the_same_draw() -> None:
    groups = [group(f"question number {i}", (f"same number {i}",), (f"trap number {i}",)) for i in range(50)]
    draw = dice(1)
    one, other = lessons(groups, draw), lessons(groups, draw)
    assert one != other
    assert lessons(groups, dice(1)) == one


def test_the_digest_names_what_is_said_in_any_order() -> None:
    one, other = group("a", ("b",), ("c",)), group("d")
    assert groups_digest([one, other]) == groups_digest([other, one])
    assert groups_digest([one]) != groups_digest([group("a", ("b",), ("x",))])
