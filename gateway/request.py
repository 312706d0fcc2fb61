"""Reading a chat request: bytes in, one frozen `ChatRequest` out; no I/O.

Only what the gateway itself reads is validated; everything else is passed on to vLLM, which knows it better.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from gateway.errors import BadRequest

Body = dict[str, Any]

# Fields that change the form of an answer and not the answer.
FORM_FIELDS = frozenset({"stream", "stream_options"})
# Fields that say for whom an answer is and change nothing in it.
USER_FIELDS = ("user", "safety_identifier", "prompt_cache_key")
BYTES_PER_TOKEN = 4
# What a part of an earlier turn may be; a picture or a file behind an address may be another one tomorrow.
TEXT_PARTS = frozenset({"text", "refusal", "thinking", "redacted_thinking", "tool_use"})


@dataclass(frozen=True, slots=True)
class ChatRequest:
    body: Body  # as sent by the client
    model: str  # the alias `auto` or a model's name
    stream: bool
    include_usage: bool  # the client wants the usage chunk at the end of a stream
    question: str  # text of the last user turn, "" when there is none
    prompt_tokens: int  # of all messages, estimated at 4 UTF-8 bytes a token: known without a model
    messages: list[Body]  # see `View`
    beside: list[Any]  # everything of the body that can change the answer other than the wording of the question
    user: Body  # the fields that say for whom it is, as far as these are not in `beside`
    uncacheable: str | None  # why its answer is neither replayed nor stored, whatever the configuration says


@dataclass(frozen=True, slots=True)
class View:
    """What a body asks, read as a chat whatever its form is."""

    messages: list[Body]  # as those of a chat completion: read here, never sent
    beside: list[Any]  # see `ChatRequest`
    uncacheable: str | None = None  # what stands in the way in this form only
    user_fields: tuple[str, ...] = USER_FIELDS  # of this form, that say for whom the answer is


@dataclass(frozen=True, slots=True)
class CacheControl:
    """The request header x-fingerpost-cache-control."""

    lookup: bool = True
    store: bool = True
    ttl_seconds: int | None = None  # that the answer may be replayed for; at most what the configuration says


def chat_view(body: Body) -> View:
    """The view of a chat completion. Raises `BadRequest`."""
    messages = checked_messages(body)
    return View(messages, beside(body, "messages", messages))


def parse(raw: bytes, view: Callable[[Body], View] = chat_view) -> ChatRequest:
    """Read a body that `view` understands; raises `BadRequest` naming the field."""
    body = decode(raw)
    model = typed(body, "model", str, "a string", required=True)
    if not model:
        raise BadRequest("model must not be empty", param="model")
    viewed = view(body)
    messages = viewed.messages
    stream_options = typed(body, "stream_options", dict, "an object") or {}
    last_user = next((message for message in reversed(messages) if message["role"] == "user"), None)
    return ChatRequest(
        body=body,
        model=model,
        stream=typed(body, "stream", bool, "a boolean") or False,
        include_usage=typed(stream_options, "include_usage", bool, "a boolean", "stream_options.") or False,
        question=text_of(last_user).strip() if last_user else "",
        prompt_tokens=sum(len(text_of(message).encode()) for message in messages) // BYTES_PER_TOKEN,
        messages=messages,
        beside=viewed.beside,
        user={key: body[key] for key in viewed.user_fields if body.get(key) is not None},
        uncacheable=viewed.uncacheable or _not_a_question(messages) or _not_one_text(body),
    )


_TTL = re.compile(r"ttl=(\d{1,9})", re.ASCII)


def parse_cache_control(header: str | None) -> CacheControl:
    directives = {part.strip().lower() for part in (header or "").split(",")} - {""}
    ttls = [int(found[1]) for part in directives if (found := _TTL.fullmatch(part))]
    unknown = {part for part in directives if not _TTL.fullmatch(part)} - {"no-cache", "no-store"}
    if unknown:
        words = f"takes no-cache, no-store and ttl=seconds, not {', '.join(sorted(unknown))!r}"
        raise BadRequest(f"x-fingerpost-cache-control {words}")
    ttl = min(ttls, default=None)
    return CacheControl("no-cache" not in directives, "no-store" not in directives and ttl != 0, ttl)


def credential(headers: Mapping[str, str]) -> str:
    """Who is asking: a digest of the credential, so that two keys never share an answer and none is kept."""
    credential, other = headers.get("authorization", ""), headers.get("x-api-key")  # Anthropic's clients send the other
    return hashlib.sha256((credential if other is None else f"{credential}\0{other}").encode()).hexdigest()


def scope_key(request: ChatRequest, owner: str) -> str:
    """Digest of everything that can change the answer other than the wording of the last user turn.

    `owner`: whose answers they are, see `owner`.
    """
    return hashlib.sha256(orjson.dumps([owner, *request.beside], option=orjson.OPT_SORT_KEYS)).hexdigest()


def owner(request: ChatRequest, sharing: Literal["tenant", "user", "global"], tenant: str, credential: str) -> str:
    """Who shares answers: all, one tenant, or one user of it, that is one key and what the request says of the user."""
    if sharing == "global":
        return "global"
    if sharing == "tenant":
        return tenant
    return orjson.dumps([tenant, credential, request.user], option=orjson.OPT_SORT_KEYS).decode()


def beside(body: Body, asked: str, turns: list[Body], user_fields: Sequence[str] = USER_FIELDS) -> list[Any]:
    """All of a body but whom it is for and the wording of the last of its `turns`, which are under the key `asked`."""
    *earlier, last = turns
    around = {**last, "content": _without_text(last.get("content"))}
    left_out = {*FORM_FIELDS, asked, *user_fields}
    fields = {key: value for key, value in body.items() if key not in left_out}
    return [fields, earlier, around]


def _without_text(content: object) -> object:
    """What a message's content says beside its text: nothing, for a string."""
    parts = (part for part in content if isinstance(part, dict)) if isinstance(content, list) else ()
    beside = ({key: value for key, value in part.items() if key not in ("type", "text")} for part in parts)
    return [fields for fields in beside if fields]


def question_key(scope: str, question: str) -> str:
    """Identity of a cached answer: one per scope and question."""
    return hashlib.sha256(f"{scope}\0{question}".encode()).hexdigest()


def upstream_body(request: ChatRequest, model: str, *, want_usage: bool) -> bytes:
    """What vLLM gets: the client's fields with the model's name; `want_usage` also asks for a stream's usage chunk."""
    body = {**request.body, "model": model}
    if want_usage and request.stream:
        options = body.get("stream_options") or {}
        if not request.include_usage:  # which else would begin to count
            options = {key: value for key, value in options.items() if key != "continuous_usage_stats"}
        body["stream_options"] = {**options, "include_usage": True}
    return orjson.dumps(body)


_MANY_DIGITS = re.compile(rb"\d{19}")


def _as_passed_on(digits: str) -> int:
    """Raises `BadRequest` for a whole number that orjson would turn into a float."""
    if not -(2**63) <= (number := int(digits[:25])) < 2**64 or len(digits) > 25:
        raise BadRequest("the body holds a whole number of more than 64 bits")
    return number


def decode(raw: bytes) -> Body:
    try:
        body = orjson.loads(raw)
        orjson.dumps([body])  # refuses what could not be passed on: deeper nesting than orjson writes
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    except orjson.JSONEncodeError as error:
        raise BadRequest(f"the body cannot be passed on: {error}") from error
    if _MANY_DIGITS.search(raw):
        json.loads(raw, parse_int=_as_passed_on)
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def typed(body: Body, key: str, kind: type, words: str, prefix: str = "", *, required: bool = False) -> Any:
    value = body.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadRequest(f"{prefix}{key} is {'required' if value is None else f'not {words}'}", param=prefix + key)
    return value


def check_fields(body: Body, known: Sequence[str], what: str) -> None:
    """Raises `BadRequest` naming a field that `what` does not have."""
    if unknown := sorted(body.keys() - set(known)):
        name = unknown[0][:100]
        raise BadRequest(f"{name} is not a field of {what} ({', '.join(known)} are)", param=name)


def checked_messages(body: Body) -> list[Body]:
    """The messages of a chat, each with a role and content that can be read. Raises `BadRequest`."""
    messages: list[Body] = typed(body, "messages", list, "an array", required=True)
    if not messages:
        raise BadRequest("messages must not be empty", param="messages")
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]")
    return messages


def _check_message(message: object, path: str) -> None:
    if not isinstance(message, dict):
        raise BadRequest(f"{path} is not an object", param=path)
    if not isinstance(message.get("role"), str):
        raise BadRequest(f"{path}.role is {'not a string' if 'role' in message else 'required'}", param=f"{path}.role")
    content = message.get("content")
    if (content is None and message["role"] != "user") or isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise BadRequest(f"{path}.content must be a string or a non-empty array of parts", param=f"{path}.content")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadRequest(f"{path}.content[{i}] must be an object with a type", param=f"{path}.content[{i}]")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise BadRequest(f"{path}.content[{i}].text is not a string", param=f"{path}.content[{i}].text")


def _parts(message: Body) -> list[Body]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def text_of(message: Body) -> str:
    """All the text in the content of a message."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def _not_a_question(messages: list[Body]) -> str | None:
    last = messages[-1]
    content = last.get("content")
    if last["role"] != "user":
        return "the last message is not the user's"
    if isinstance(content, list) and any(part["type"] != "text" for part in content):
        return "the last message is not text alone"
    if not text_of(last).strip():
        return "the last message is empty"
    if any(part["type"] not in TEXT_PARTS for message in messages for part in _parts(message)):
        return "an earlier message is not text alone"
    return None


def _not_one_text(body: Body) -> str | None:
    """Why an answer of one text, the same each time, is not what the body asks for."""
    if body.get("n") not in (None, 1):
        return "n is not 1"
    wanted = (body.get(key) for key in ("logprobs", "top_logprobs", "prompt_logprobs"))
    if any(value is not None and value is not False for value in wanted):  # 0 asks for them, too
        return "log probabilities are asked for"
    if any(body.get(key) for key in body if key.startswith("return_") or key in ("echo", "kv_transfer_params")):
        return "more than an answer is asked for"  # the prompt, say, or token ids
    return None


_REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


def is_request_id(value: str | None) -> bool:
    """Whether a client's x-request-id is safe to log and to echo."""
    return value is not None and _REQUEST_ID.fullmatch(value) is not None
