"""What an answer took, in tokens, as vLLM tells it in any of the APIs' forms. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gateway.answer import loaded

_TOLD = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = ("prompt_tokens", "input_tokens")  # in OpenAI's older words, and in its newer ones, which are Anthropic's
_ANSWER = ("completion_tokens", "output_tokens")


def usage(piece: bytes) -> dict[str, int]:
    """The figures under `usage` in an answer or an event of any of the APIs; empty when there are none.

    Anthropic's first event has them under `message`, where those of the answer, which has only begun, are left out.
    """
    if not _TOLD.search(piece):
        return {}
    body = loaded(piece)
    if not isinstance(body, dict):
        return {}
    begun = {name: count for name, count in _figures(body.get("message")).items() if name in _PROMPT}
    return begun or _figures(body) or _figures(body.get("response"))


def _figures(holder: object) -> dict[str, int]:
    if isinstance(holder, dict) and isinstance(told := holder.get("usage"), dict):
        return {name: count for name, count in told.items() if type(count) is int and count >= 0}
    return {}


def total(figures: Mapping[str, int]) -> int:
    """Tokens of prompt and answer; 0 while those of the answer are not told."""
    if figures.keys().isdisjoint(("total_tokens", *_ANSWER)):
        return 0
    return figures.get("total_tokens") or sum(figures.get(name, 0) for name in (*_PROMPT, *_ANSWER))


def by_kind(figures: Mapping[str, object]) -> dict[str, int]:
    """Those of the prompt and of the completion, as far as they are told."""
    kinds = (("prompt", _PROMPT), ("completion", _ANSWER))
    told = ((kind, next((figures[name] for name in names if name in figures), None)) for kind, names in kinds)
    return {kind: count for kind, count in told if isinstance(count, int)}
