"""What the configuration keeps out of the cache: high temperatures, and questions whose answer ages."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from gateway.cacheable import is_timely, uncacheable
from gateway.config import SemanticCache
from gateway.request import parse


def reason(question: str = "Name a river.", *, settings: SemanticCache | None = None, **fields: Any) -> str | None:
    body = {"model": "auto", "messages": [{"role": "user", "content": question}], **fields}
    return uncacheable(parse(json.dumps(body).encode()), settings or SemanticCache())


@pytest.mark.parametrize(
    ("temperature", "most", "cached"),
    [(0.7, 1.0, True), (1, 1.0, True), (1.01, 1.0, False), (0.3, 0.2, False), (None, 0.0, True), (2, 2.0, True)],
)
def test_the_temperature_up_to_which_answers_are_cached(temperature: float | None, most: float, cached: bool) -> None:
    found = reason(temperature=temperature, settings=SemanticCache(max_temperature=most))
    assert found == (None if cached else f"temperature is above {most:g}")


def test_what_the_request_says_itself_comes_first() -> None:
    assert reason(n=2, temperature=3) == "n is not 1"


@pytest.mark.parametrize(
    "question",
    [
        "What is the weather in Oslo?",
        "What are today's headlines?",
        "Who is the current president of France?",
        "latest version of Python",
        "What time is it in Tokyo",
        "Is the pharmacy open right now?",
        "Where is the space station now?",
        "what did the markets do yesterday",
        "Which films came out this week?",
        "Who won last night's debate?",
        "this year\u2019s Super Bowl winner",
        "bitcoin price? what are gas prices",
        "What happened three days ago in parliament",
        "What is on TV tonight",
        "¿Qué tiempo hace hoy en Madrid?",
        "Quel temps fait-il aujourd\u2019hui ?",
        "Was läuft heute im Kino?",
        "Che giorno è oggi?",
        "Qual é a cotação de hoje?",
    ],
)
def test_a_question_whose_answer_ages(question: str) -> None:
    assert is_timely(question)
    assert reason(question) == "the answer depends on when it is given"
    assert reason(question, settings=SemanticCache(bypass_time_dependent=False)) is None


@pytest.mark.parametrize(
    "question",
    [
        "What are the main renewable energy sources?",
        "What is the difference between direct current and alternating current?",
        "How do I measure the current through a resistor?",
        "Now write it as a poem.",
        "What is the now() function in SQL?",
        "How do I learn to say no?",
        "Translate 'daytime' into German",
        "How is yeast made?",
        "What does the current directory mean in a shell?",
        "Who wrote The Catcher in the Rye?",
        "What was the Newsweek affair?",
    ],
)
def test_a_question_whose_answer_does_not(question: str) -> None:
    assert reason(question) is None


def test_a_long_question_is_searched_in_no_time() -> None:
    began = time.perf_counter()
    is_timely("what is it that can be done where who " * 20_000)
    assert time.perf_counter() - began < 1
