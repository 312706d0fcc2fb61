"""Whether an answer may be replayed to others who ask the same, as far as the request tells; no I/O.

`gateway.request` says so of the form of a request; here is what the configuration decides.
"""

from __future__ import annotations

import re
from typing import Any

from gateway.config import SemanticCache
from gateway.request import ChatRequest

SEARCHED_CHARACTERS = 4_000  # of a question, from its end back
# Words whose answer is another one tomorrow. One too many costs a hit, one too few an answer that has aged.
_AGEING = """
    today todays tonight tonights tomorrow tomorrows yesterday yesterdays nowadays currently latest recent
    recently lately newest news headline headlines weather forecast forecasts
    hoy ahora ayer mañana actualmente aujourd'hui maintenant demain actuellement heute jetzt gestern morgen aktuell
    aktuelle aktuellen derzeit zurzeit momentan neueste neuesten oggi adesso ieri domani attualmente hoje agora ontem
    amanhã atualmente
"""
_PERIODS = """
    second minute hour morning afternoon evening night day week weekend month quarter season semester term spring summer
    autumn fall winter year decade monday tuesday wednesday thursday friday saturday sunday
"""
_WORDS = frozenset(_AGEING.split())
_PHRASES = frozenset(
    [
        *(f"{which} {period}" for which in ("this", "last", "next", "past", "coming") for period in _PERIODS.split()),
        *(f"{period}{s} ago" for period in _PERIODS.split() for s in ("", "s")),
        *(f"{period}{s} from now" for period in _PERIODS.split() for s in ("", "s")),
        *(f"{of} price{s}" for of in ("stock", "share", "gas", "petrol", "gold", "oil", "bitcoin") for s in ("", "s")),
        *(f"{of} {what}" for of in ("esta", "questa") for what in ("semana", "noche", "tarde", "settimana", "sera")),
        *(f"{of} {what}" for of in ("diese", "dieser", "diesen", "dieses") for what in ("woche", "monat", "jahr")),
        *("right now", "just now", "until now", "as of now", "these days", "so far", "at present", "at the moment"),
        *("up to date", "up-to-date", "what time is it", "the time in", "what day is it", "exchange rate"),
        *("exchange rates", "live score", "live scores", "live results", "still alive", "still open", "still valid"),
        *("este mes", "este año", "ce soir", "ce mois", "cette semaine", "cette année", "questo mese", "quest'anno"),
        *("este mês", "este ano", "esta semana", "últimas noticias"),
    ]
)
_LONGEST = max(len(phrase.split()) for phrase in _PHRASES)
# "now" and "current" are also a manner of speaking and a flow: "now write ...", "alternating current".
_ASKS = "is are was does do did has have should can will who what where"
_FLOWS = "direct alternating electric electrical ocean eddy rip inrush"
_OF_FLOWS = "density source flow divider limit transformer directory folder working user branch through in"
_ASKING, _BEFORE, _AFTER = (frozenset(words.split()) for words in (_ASKS, _FLOWS, _OF_FLOWS))
_WORD = re.compile(r"[^\W_][\w'-]*\(?")


def is_timely(question: str) -> bool:
    """Whether the answer depends on when it is given."""
    found = _WORD.findall(question[-SEARCHED_CHARACTERS:].replace("\u2019", "'").lower())
    words = [word.removesuffix("'s").removesuffix("'") for word in found]  # this week's
    if not _WORDS.isdisjoint(words) or _says_current(words) or _says_now(words):
        return True
    return any(
        not _PHRASES.isdisjoint(map(" ".join, zip(*(words[i:] for i in range(length)), strict=False)))
        for length in range(1, _LONGEST + 1)
    )


def _says_now(words: list[str]) -> bool:
    """At the end of more than this word, or after a word that asks."""
    return any(word == "now" and i and (i == len(words) - 1 or _asks(words[:i])) for i, word in enumerate(words))


def _asks(words: list[str]) -> bool:
    return not _ASKING.isdisjoint(words[-12:])


def _says_current(words: list[str]) -> bool:
    """Before a word that is not about flows, say."""
    around = zip(["", *words], words, words[1:], strict=False)
    return any(word == "current" and before not in _BEFORE and after not in _AFTER for before, word, after in around)


def uncacheable(request: ChatRequest, settings: SemanticCache) -> str | None:
    """Why the answer is neither replayed nor stored."""
    if request.uncacheable:
        return request.uncacheable
    temperature = request.body.get("temperature")
    if temperature is not None and not _is_at_most(temperature, settings.max_temperature):
        return f"temperature is above {settings.max_temperature:g}"
    if settings.bypass_time_dependent and is_timely(request.question):
        return "the answer depends on when it is given"
    return None


def _is_at_most(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and value <= most
