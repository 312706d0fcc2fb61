"""Whether a condition holds for a prompt, and what is true of the prompt in words. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from gateway import regex
from gateway.config import AUTO, Condition


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a rule may look at. Category and complexity are None, and quality is empty, when nothing read the prompt."""

    text: str  # of the user turn
    prompt_tokens: int
    category: str | None
    complexity: float | None
    quality: Mapping[str, float] = field(default_factory=dict)  # model -> probability that its answer is right
    confidence: float | None = None  # probability of the category
    tenant: str | None = None
    alias: str = AUTO
    has_tools: bool = False
    has_images: bool = False
    context_tokens: int = 0  # of all that the model reads, the tools, too
    output_tokens: int | None = None  # the most that the client asks for


def holds(when: Condition, prompt: Prompt) -> bool | None:
    """None when it cannot be told, because it depends on what is not known of the prompt."""
    return _all(_parts(when, prompt))


def facts(when: Condition, prompt: Prompt) -> Iterator[str]:
    """What is true of the prompt in the things that a condition looks at, in words; of `any`, what makes it hold."""
    yield from (look.fact(when, prompt) for look in _looks(when))
    any_of = [part for part in when.any if holds(part, prompt)] or when.any
    for part in (*when.all, *any_of, *((when.negated,) if when.negated else ())):
        yield from facts(part, prompt)


def _parts(when: Condition, prompt: Prompt) -> Iterator[bool | None]:
    """Whether each thing that a condition gives holds."""
    yield from (look.holds(when, prompt) for look in _looks(when))
    yield from (holds(part, prompt) for part in when.all)
    if when.any:
        yield _not(_all(_not(holds(part, prompt)) for part in when.any))
    if when.negated is not None:
        yield _not(holds(when.negated, prompt))


def _all(parts: Iterable[bool | None]) -> bool | None:
    """The logic of Kleene (1952): what is not known decides nothing, and what does not need it is known."""
    known: bool | None = True
    for part in parts:
        if part is False:
            return False
        known = known and part
    return known


def _not(part: bool | None) -> bool | None:
    return None if part is None else not part


@dataclass(frozen=True, slots=True)
class _Look:
    """One thing of a prompt that a condition may look at."""

    key: str  # of the condition
    holds: Callable[[Condition, Prompt], bool | None]
    fact: Callable[[Condition, Prompt], str]


def _looks(when: Condition) -> Iterator[_Look]:
    """The things that a condition looks at, the cheap ones first."""
    return (look for look in _LOOKS if getattr(when, look.key) not in (None, ()))


def _has_tokens(when: Condition, prompt: Prompt) -> bool:
    return when.prompt_tokens is None or prompt.prompt_tokens in when.prompt_tokens


def _is_in_category(when: Condition, prompt: Prompt) -> bool | None:
    if prompt.category is None:
        return None
    if prompt.category not in when.category or when.min_confidence is None:
        return prompt.category in when.category
    return None if prompt.confidence is None else prompt.confidence >= when.min_confidence


def _category(when: Condition, prompt: Prompt) -> str:
    sure = "" if prompt.confidence is None else f" ({prompt.confidence:.3f})"
    return f"category {prompt.category or 'not known'}{sure}"


def _is_complex(when: Condition, prompt: Prompt) -> bool | None:
    return None if prompt.complexity is None or when.complexity is None else prompt.complexity in when.complexity


def _complexity(when: Condition, prompt: Prompt) -> str:
    return "complexity not known" if prompt.complexity is None else f"complexity {prompt.complexity:.3f}"


def _has_keyword(when: Condition, prompt: Prompt) -> bool:
    return _pattern(when.keywords).search(prompt.text) is not None


def _keyword(when: Condition, prompt: Prompt) -> str:
    found = _pattern(when.keywords).search(prompt.text)
    return "none of the keywords" if found is None else f"keyword {found[0]!r}"


def _matches(when: Condition, prompt: Prompt) -> bool:
    return regex.found(when.regex, prompt.text) is not None


def _match(when: Condition, prompt: Prompt) -> str:
    found = regex.found(when.regex, prompt.text)
    return "no match of the regex" if found is None else f"match of the regex {found.pattern!r}"


_LOOKS = (
    _Look("alias", lambda when, prompt: prompt.alias in when.alias, lambda when, prompt: f"alias {prompt.alias}"),
    _Look("tenant", lambda when, prompt: prompt.tenant in when.tenant, lambda when, prompt: f"tenant {prompt.tenant}"),
    _Look(
        "has_tools",
        lambda when, prompt: prompt.has_tools is when.has_tools,
        lambda when, prompt: "tools" if prompt.has_tools else "no tools",
    ),
    _Look(
        "has_images",
        lambda when, prompt: prompt.has_images is when.has_images,
        lambda when, prompt: "images" if prompt.has_images else "no images",
    ),
    _Look("prompt_tokens", _has_tokens, lambda when, prompt: f"about {prompt.prompt_tokens} prompt tokens"),
    _Look("category", _is_in_category, _category),
    _Look("complexity", _is_complex, _complexity),
    _Look("keywords", _has_keyword, _keyword),
    _Look("regex", _matches, _match),
)


@lru_cache(maxsize=256)
def _pattern(keywords: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the keywords as whole words, whatever their case.

    A word of a script that puts no spaces between words (whose letters have no case) is found wherever it stands.
    """
    spaced = "|".join(re.escape(word) for word in keywords if _is_spaced(word))
    whole = [rf"(?<!\w)(?:{spaced})(?!\w)"] if spaced else []
    anywhere = [re.escape(word) for word in keywords if not _is_spaced(word)]
    return re.compile("|".join([*whole, *anywhere]), re.IGNORECASE)


def _is_spaced(word: str) -> bool:
    return word.isascii() or word.lower() != word.upper()
