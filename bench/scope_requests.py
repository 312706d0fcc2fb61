"""What the clients of `bench.scopes` ask: conversations that differ in little, questions that seem alike; no I/O."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.scope_stub import LARGE, Body

SMALL = "small"
TENANTS = ("north", "south")
ALIASES = {"auto": SMALL, "auto-best": LARGE, "auto-brief": SMALL, SMALL: SMALL, LARGE: LARGE}  # -> who answers
BRIEF: Body = {"chat_template_kwargs": {"enable_thinking": False}}  # what the rule of auto-brief changes

# Wordings of one question in a line, and questions that are not it in the lines around. By the words that they share,
# or by meaning, the wordings are near; so are some of the others, and are not to be taken for it.
MEANINGS: tuple[tuple[str, ...], ...] = (
    ("How tall is the Eiffel Tower?", "How tall is the Eiffel Tower in Paris?", "What is the Eiffel Tower's height?"),
    ("How tall is the Space Needle?", "How tall is the Space Needle in Seattle?"),
    ("Which animals can swim?", "Which animals can swim at all?"),
    ("Which animals can not swim?", "Which animals can not swim at all?"),
    ("Which metals are magnetic?", "Tell me which metals are magnetic.", "What metals are magnetic?"),
    ("Which metals are not magnetic?", "Tell me which metals are not magnetic."),
    ("What should a cat eat?", "What should a house cat eat?"),
    ("What should a cat not eat?", "What should a house cat not eat?"),
    ("Explain photosynthesis briefly to a child.", "Please explain photosynthesis briefly to a child."),
    ("Explain cellular respiration in two short sentences.", "Please explain cellular respiration in two sentences."),
    (
        "What is the deepest lake on Earth?",
        "Which lake is the deepest on Earth?",
        "What is the deepest lake on our Earth?",
    ),
    ("Who wrote Don Quixote?", "So who wrote Don Quixote?"),
    ("Who wrote Moby Dick?", "So who wrote Moby Dick?"),
    ("What are the main renewable energy sources?", "What are the main sources of renewable energy?"),
    (
        "What are the main non-renewable fossil fuel reserves?",
        "What are the main reserves of non-renewable fossil fuel?",
    ),
    ("Translate good morning into French.", "Please translate good morning into French."),
    ("Translate thank you into French.", "Please translate thank you into French."),
    ("How many bones does an adult human have?", "How many bones does a human adult have?"),
    ("How many chromosomes has a fruit fly?", "How many chromosomes has the fruit fly?"),
    ("Why is the sky blue?", "Why is the sky blue at noon?"),
    ("Why are sunsets red?", "Why are sunsets so red?"),
    ("Write a haiku about the first frost.", "Write me a haiku about the first frost."),
)
TIMELY = (
    "What is the weather in Oslo today?",
    "Who leads the chess tournament right now?",
    "Any news from Rome today?",
)

_SYSTEMS = (
    None,
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a pirate.",
    "Answer in French.",
)
_TURNS = (
    ("Hello!", "Hello, how can I help?"),
    ("Hello!", "Hello! How can I help?"),
    ("I am nine years old.", "I shall keep it simple."),
    ("I am a biologist.", "I shall be precise."),
    ("Never mention prices.", "I shall not."),
)


def _tool(name: str, description: str) -> Body:
    parameters = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_TOOLS: tuple[Body, ...] = (
    {},
    {},
    {"tools": [_tool("look_up", "Looks a key up.")]},
    {"tools": [_tool("look_up", "Looks a key up in the archive.")]},
    {"tools": [_tool("look_up", "Looks a key up."), _tool("forget", "Forgets a key.")]},
    {"tools": [_tool("look_up", "Looks a key up.")], "tool_choice": "none"},
)


def _schema(name: str) -> Body:
    schema = {"type": "object", "properties": {name: {"type": "string"}}}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


_FORMATS: tuple[Body, ...] = (
    {},
    {},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    _schema("answer"),
    _schema("reply"),
)
_SAMPLING: tuple[Body, ...] = (
    {},
    {"temperature": 0},
    {"temperature": 0.2},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 0.7, "seed": 2},
    {"max_tokens": 100},
    {"max_tokens": 1000},
    {"stop": ["\n"]},
    {"presence_penalty": 0.5},
    {"temperature": 1.5},  # above semantic_cache.max_temperature: never cached
)
CONTROLS = (
    *[""] * 84,
    *["no-cache"] * 4,
    *["no-store"] * 4,
    *["no-cache, no-store"] * 2,
    *["ttl=1"] * 4,
    "ttl=0",
    "ttl=5",
)
KINDS = (
    *["plain"] * 70,
    *["long"] * 9,
    *["slow"] * 6,
    *["huge"] * 1,
    *["break"] * 4,
    *["length"] * 4,
    *["unended", "error", "failed", "busy"] * 2,
)
ACTIVE = 6  # conversations at a time
EACH_NEW = 150  # requests, after which another conversation takes the place of one


def spellings(text: str) -> tuple[str, ...]:
    return text.lower(), f"{text} Please.", f"Hi, {text}", text.rstrip("?."), f" {text}\n", text.replace(" ", "  ")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request says beside its question."""

    model: str = "auto"
    system: str | None = None
    turns: tuple[int, ...] = ()  # of `_TURNS`
    fields: Mapping[str, int] = field(default_factory=dict)  # which of the pools above

    def body(self, asked: object) -> Body:
        earlier = [message for turn in self.turns for message in _messages(*_TURNS[turn])]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        chosen = {key: value for name, pool in POOLS.items() for key, value in pool[self.fields[name]].items()}
        messages = [*system, *earlier, {"role": "user", "content": asked}]
        return {"model": self.model, "messages": messages, **chosen}


POOLS: Mapping[str, Sequence[Body]] = {"tools": _TOOLS, "format": _FORMATS, "sampling": _SAMPLING}


def _messages(said: str, answered: str) -> list[Body]:
    return [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as the client means it."""

    tenant: str
    conversation: Conversation
    question: str
    meaning: int  # of `MEANINGS`; -1: of `TIMELY`
    body: Body
    control: str = ""
    kind: str = "plain"  # of its generation, if there is one
    leaves: bool = False  # in the middle of the answer

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        return bool(self.body.get("stream_options"))

    @property
    def directives(self) -> set[str]:
        return {part.strip() for part in self.control.split(",")} - {""}

    @property
    def is_timely(self) -> bool:
        return self.meaning < 0

    @property
    def is_hot(self) -> bool:
        return float(self.body.get("temperature", 0)) > 1

    @property
    def ttl_seconds(self) -> int | None:
        return next((int(part[4:]) for part in self.directives if part.startswith("ttl=")), None)

    @property
    def may_be_replayed(self) -> bool:
        """Whether its generation may be given to others, later."""
        is_whole = self.kind in ("plain", "long", "slow", "huge", "busy")
        return is_whole and not self.is_timely and not self.is_hot and not self.directives & {"no-store", "ttl=0"}

    def upstream(self, model: str) -> Body:
        """What `model` gets of it, as far as it matters."""
        return {**self.body, "model": model, **(BRIEF if self.body["model"] == "auto-brief" else {})}


class Requests:
    """What is asked, one request or some at once; the same for the same seed and order of calls."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 (nothing is secret)
        self.conversations = [self._new()]
        while len(self.conversations) < ACTIVE:
            self.conversations.append(self._changed(self._random.choice(self.conversations)))
        self._asked = 0

    def next(self) -> list[Asked]:
        """Requests to be sent at the same time."""
        self._asked += 1
        if self._asked % EACH_NEW == 0:
            change = self._random.random() < 0.7
            self.conversations.append(self._changed(self._random.choice(self.conversations)) if change else self._new())
        one = self._one()
        return self._at_once(one) if self._random.random() < 0.04 else [one]

    def _one(self) -> Asked:
        chosen, conversation = self._random, self._conversation()
        meaning = min(int(chosen.random() ** 2 * len(MEANINGS)), len(MEANINGS) - 1)
        text = self._spelled(chosen.choice(MEANINGS[meaning]))
        if chosen.random() < 0.03:
            meaning, text = -1, chosen.choice(TIMELY)
        asked = [{"type": "text", "text": text}] if chosen.random() < 0.05 else text
        body = {**conversation.body(asked), **self._form()}
        one = Asked(chosen.choice(TENANTS), conversation, text.strip(), meaning, body, chosen.choice(CONTROLS))
        kind = chosen.choice(KINDS)
        return replace(one, kind=kind, leaves=one.streams and chosen.random() < 0.06)

    def _at_once(self, one: Asked) -> list[Asked]:
        """The same from both tenants and in both forms, while it is being generated."""
        number = self._random.randrange(2, 7)
        among = [replace(one, tenant=TENANTS[i % 2], control="", kind="slow", leaves=False) for i in range(number)]
        asked = ("model", "messages", *(key for pool in POOLS.values() for fields in pool for key in fields))
        bare = {key: value for key, value in one.body.items() if key in asked}
        others = [replace(each, body={**bare, **self._form()}) for each in among]
        return [replace(each, leaves=each.streams and self._random.random() < 0.2) for each in others]

    def _form(self) -> Body:
        """What changes nothing in the answer: who asks, and how it is to come."""
        chosen = self._random
        user = {"user": f"user-{chosen.randrange(3)}"} if chosen.random() < 0.7 else {}
        if chosen.random() < 0.5:
            return {**user, "stream": False} if chosen.random() < 0.1 else user
        return {
            **user,
            "stream": True,
            **({"stream_options": {"include_usage": True}} if chosen.random() < 0.4 else {}),
        }

    def _spelled(self, text: str) -> str:
        """Some in other letters, which are no other words."""
        return self._random.choice(spellings(text)) if self._random.random() < 0.15 else text

    def _conversation(self) -> Conversation:
        old = self._random.random() < 0.03
        return self._random.choice(self.conversations if old else self.conversations[-ACTIVE:])

    def _new(self) -> Conversation:
        chosen = self._random
        turns = tuple(chosen.choices(range(len(_TURNS)), k=chosen.randrange(5)))
        fields = {name: chosen.randrange(len(pool)) for name, pool in POOLS.items()}
        fields["sampling"] = chosen.randrange(len(_SAMPLING) - 1)
        return Conversation(chosen.choice([*ALIASES]), chosen.choice(_SYSTEMS), turns, fields)

    def _changed(self, one: Conversation) -> Conversation:
        """One that differs in a single thing, if at all."""
        chosen = self._random
        changes: list[dict[str, Any]] = [
            {"model": chosen.choice([*ALIASES])},
            {"system": chosen.choice(_SYSTEMS)},
            {"turns": (*one.turns, chosen.randrange(len(_TURNS)))[-4:]},
            {"turns": one.turns[::-1]},
            *({"fields": {**one.fields, name: chosen.randrange(len(pool))}} for name, pool in POOLS.items()),
        ]
        return replace(one, **chosen.choice(changes))
