"""What is asked: texts that no two requests share, wordings that mean the same, and the bodies around them; no I/O."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import count

SYSTEM = "You are a helpful assistant."
WORDS_OF_A_TEXT = 12

# As far apart as words are, so that no text of them is near another by meaning.
WORDS = (
    "glacier violin mortgage penguin diesel cathedral saffron algorithm tornado embroidery kidney "
    "parliament volcano chess orchid submarine invoice trumpet desert molecule pension falcon ceramics "
    "electricity monastery marathon yeast satellite theatre granite divorce honey turbine alphabet "
    "leopard insurance waterfall piano asteroid bakery passport coral hammer philosophy vaccine railway "
    "butterfly whisky earthquake grammar copper ballet tractor eclipse sculpture cheese lawyer lighthouse "
    "magnet jungle inflation owl carpet antibiotic bridge opera lemon rocket library mosquito sail "
    "election mirror potato dinosaur candle surgery vineyard compass wolf laundry telescope bankruptcy "
    "mushroom tunnel poetry battery rice castle allergy drum harbour fossil chocolate refugee umbrella "
    "circuit shepherd perfume avalanche football census knitting whale cement tax lullaby barometer "
    "cactus ferry dentist origami plutonium goat auction rainbow typewriter elbow senate pepper glove "
    "comet wedding robot cabbage prison sonnet anchor flu tapestry zebra gearbox oasis dictionary bamboo "
    "strike"
)

# (a question that is asked first, another wording of it): pairs that the README and the tests show to be hits.
PAIRS = (
    ("What are the main renewable energy sources?", "Which are the most important sources of renewable energy?"),
    ("How tall is the Eiffel Tower?", "What is the height of the Eiffel Tower?"),
    ("What is the deepest lake on Earth?", "Which lake is the deepest on Earth?"),
)


def new_texts(seed: int) -> Iterator[str]:
    """Texts of some 15 tokens, each different in its words from all others."""
    chosen, words = random.Random(seed), WORDS.split()  # noqa: S311 (nothing is secret)
    while True:
        yield " ".join(chosen.sample(words, WORDS_OF_A_TEXT))


def wordings() -> Iterator[str]:
    """The second wordings of `PAIRS` in turn, each time in other capitals or spaces: another text, the same embedding.

    The embedder reads neither. What the gateway remembers of the texts it has read therefore never helps: no text comes
    again within 2,000 others.
    """
    for number in count():
        yield variant(PAIRS[number % len(PAIRS)][1], number // len(PAIRS))


def variant(text: str, number: int) -> str:
    """One of the spellings of a text: which words begin with a capital, and which gap is two spaces wide."""
    words = text.split()
    gap, capitals = divmod(number, 2 ** len(words))
    cased = [word.capitalize() if capitals >> i & 1 else word.lower() for i, word in enumerate(words)]
    wide = gap % len(words)
    return "".join(word + "  " * (i == wide - 1) + " " * (i != wide - 1) for i, word in enumerate(cased)).rstrip()


def body(model: str, text: str, *, stream: bool = False) -> bytes:
    """A chat completion as clients send it, in one line."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    fields = {"model": model, "messages": messages, "temperature": 0.7}
    return json.dumps({**fields, "stream": True} if stream else fields).encode()


def bodies(model: str, texts: Sequence[str]) -> list[bytes]:
    return [body(model, text) for text in texts]
