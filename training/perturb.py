"""Prompts as hurried people type them: the same `Random` makes the same changes."""

import re
import string
from collections.abc import Callable
from functools import partial
from random import Random

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
TYPED = re.compile(r"[A-Za-z]{3,}")  # shorter words, numbers and other scripts are left alone


def _neighbours() -> dict[str, str]:
    """The keys around each letter of an American keyboard; each row sits half a key to the right of the one above."""
    found: dict[str, str] = {}
    for y, row in enumerate(ROWS):
        for x, letter in enumerate(row):
            above = ROWS[y - 1][x : x + 2] if y > 0 else ""
            below = ROWS[y + 1][max(x - 1, 0) : x + 1] if y + 1 < len(ROWS) else ""
            found[letter] = row[max(x - 1, 0) : x] + row[x + 1 : x + 2] + above + below
    return found


NEIGHBOURS = _neighbours()


def typos(text: str, draw: Random, rate: float) -> str:
    """`text` with one slip in about `rate` of its words of three letters or more; first letters are hit like others."""
    return TYPED.sub(lambda word: _slip(word[0], draw) if draw.random() < rate else word[0], text)


def _slip(word: str, draw: Random) -> str:
    """A neighbouring key, a letter dropped, two swapped, or one doubled."""
    i = draw.randrange(len(word))
    before, letter, after = word[:i], word[i], word[i + 1 :]
    kind = draw.choice(["substitute", "drop", "swap", "double"])
    if kind == "substitute":
        key = draw.choice(NEIGHBOURS[letter.lower()])
        return before + (key.upper() if letter.isupper() else key) + after
    if kind == "drop":
        return before + after
    if kind == "swap":
        i = min(i, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return before + letter * 2 + after


def title(text: str) -> str:
    return re.sub(r"\S+", lambda word: word[0][:1].upper() + word[0][1:].lower(), text)


def unpunctuated(text: str) -> str:
    """`text` without ASCII punctuation; as it was where nothing else would be left."""
    bare = text.translate(str.maketrans("", "", string.punctuation))
    return bare if bare.strip() else text


PERTURBATIONS: dict[str, Callable[[str, Random], str]] = {
    "typos in 10 % of words": partial(typos, rate=0.1),
    "typos in 30 % of words": partial(typos, rate=0.3),
    "lower case": lambda text, _: text.lower(),
    "upper case": lambda text, _: text.upper(),
    "title case": lambda text, _: title(text),
    "no punctuation": lambda text, _: unpunctuated(text),
}
