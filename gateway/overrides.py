"""What a rule changes in the request that vLLM gets, and that it is no longer the same question; no I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from gateway.config import Overrides, SystemPrompt
from gateway.request import Body

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
# The fields that limit an answer, and the one that is set when the client sets none: without it vLLM has a limit of its
# own (/v1/completions), or refuses the request (/v1/messages).
LENGTHS: Mapping[str, tuple[tuple[str, ...], str | None]] = {
    CHAT: (("max_completion_tokens", "max_tokens"), "max_completion_tokens"),
    COMPLETIONS: (("max_tokens",), None),
    RESPONSES: (("max_output_tokens",), "max_output_tokens"),
    MESSAGES: (("max_tokens",), None),
}
SYSTEM_ROLES = ("system", "developer")
SYSTEM_FIELDS = {RESPONSES: "instructions", MESSAGES: "system"}  # beside the turns


def output_tokens(body: Body, path: str = CHAT) -> int | None:
    """The most tokens that a client asks for, as far as it says so in a number."""
    lengths: Iterator[Any] = (body.get(name) for name in LENGTHS[path][0])
    return next((int(length) for length in lengths if _is_number(length) and length > 0), None)


def applied(body: Body, overrides: Overrides, path: str = CHAT) -> Body:
    """The body with what the rule says; where both say something, the rule does. Never changes the body given."""
    changed = dict(body)
    if overrides.system_prompt is not None:
        changed |= _with_system(body, overrides.system_prompt, path)
    if overrides.reasoning_effort is not None:
        changed |= _with_effort(body, overrides.reasoning_effort, path)
    if overrides.chat_template_kwargs and path != COMPLETIONS:
        theirs = body.get("chat_template_kwargs")
        changed["chat_template_kwargs"] = {**_object(theirs), **overrides.chat_template_kwargs}
    if overrides.max_tokens is not None:
        changed |= _with_limit(body, overrides.max_tokens, path)
    return changed


def scope(scope: str, overrides: Overrides) -> str:
    """The scope of answers to what the rule made of a request: another for all other overrides."""
    if not overrides.changes:
        return scope
    return hashlib.sha256(orjson.dumps([scope, overrides.changes], option=orjson.OPT_SORT_KEYS)).hexdigest()


def _with_system(body: Body, prompt: SystemPrompt, path: str) -> Body:
    if path == COMPLETIONS:
        return {}
    if prompt.replace is not None:
        return _replaced(body, prompt.replace, path)
    return _prepended(body, prompt.prepend, path)


def _replaced(body: Body, text: str, path: str) -> Body:
    asked = "input" if path == RESPONSES else "messages"
    turns = body[asked]
    if isinstance(turns, list):
        turns = [turn for turn in turns if turn.get("role") not in SYSTEM_ROLES]
    if path == CHAT:
        return {asked: [{"role": "system", "content": text}, *turns]}
    return {SYSTEM_FIELDS[path]: text, asked: turns}


def _prepended(body: Body, text: str | None, path: str) -> Body:
    if path != CHAT:
        return {SYSTEM_FIELDS[path]: _before(text, body.get(SYSTEM_FIELDS[path]))}
    first, *rest = body["messages"]
    if first["role"] not in SYSTEM_ROLES:
        return {"messages": [{"role": "system", "content": text}, first, *rest]}
    return {"messages": [{**first, "content": _before(text, first.get("content"))}, *rest]}


def _before(text: str | None, content: Any) -> Any:
    """A system prompt with a text before it; what is not text or parts is left to vLLM, which refuses it."""
    if content in (None, ""):
        return text
    if isinstance(content, str):
        return f"{text}\n\n{content}"
    return [{"type": "text", "text": text}, *content] if isinstance(content, list) else content


def _with_effort(body: Body, effort: str, path: str) -> Body:
    if path == CHAT:
        return {"reasoning_effort": effort}
    if path == RESPONSES:
        return {"reasoning": {**_object(body.get("reasoning")), "effort": effort}}
    if path == COMPLETIONS:
        return {}
    return _with_effort_of_messages(body, effort)


def _with_effort_of_messages(body: Body, effort: str) -> Body:
    """Anthropic's form has no effort `none` and no `minimal`: no thinking, and the least there is."""
    config = {key: value for key, value in _object(body.get("output_config")).items() if key != "effort"}
    if effort == "none":
        return {"thinking": {"type": "disabled"}, **({"output_config": config} if "output_config" in body else {})}
    changed: Body = {"output_config": {**config, "effort": "low" if effort == "minimal" else effort}}
    if _object(body.get("thinking")).get("type") == "disabled":
        changed["thinking"] = {"type": "adaptive"}
    return changed


def _with_limit(body: Body, most: int, path: str) -> Body:
    names, missing = LENGTHS[path]
    given = [name for name in names if body.get(name) is not None]
    if not given:
        return {missing: most} if missing else {}
    return {name: body[name] if _is_number(body[name]) and body[name] <= most else most for name in given}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _object(value: object) -> Body:
    return value if isinstance(value, dict) else {}
