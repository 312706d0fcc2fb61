"""The forms in which an answer may be asked for and given: what the gateway reads, keeps and replays of each; no I/O.

A request is sent on in the form it came in, to the same path of the model's endpoint; the answer comes back byte for
byte. What is here serves the reading (a body of any form is seen as a chat) and the cache, which holds answers that are
one text, ended by the model itself. No entry is shared between two forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway import answer as answers
from gateway import overrides, sse
from gateway.answer import Answer, Assembly, ChunkAssembly, Identity
from gateway.errors import BadRequest
from gateway.request import Body, View, beside, chat_view, checked_messages, typed
from gateway.usage import by_kind

MESSAGES_USER = ("metadata",)  # its `user_id`
# What an answer says of the one generation it came from.
PASSING_FIELDS = ("metrics", "kv_transfer_params", "ec_transfer_params")


@dataclass(frozen=True, slots=True)
class Form:
    """One form of asking and answering; its path is that of the gateway and of the model's endpoint."""

    path: str
    view: Callable[[Body], View]  # what a body asks; raises BadRequest
    whole: Callable[[bytes], Answer | None]  # the answer in a body; None when it may not be kept
    assembly: Callable[[], Assembly]  # what puts the answer together from a stream
    replay: Callable[[Answer, Identity], bytes]  # a kept answer as a body
    stream: Callable[[Answer, Identity, bool], bytes]  # and as a stream, with its usage in the end if that is asked for
    id_prefix: str
    asks_usage: bool  # a stream tells its usage only when `stream_options` asks for it


# Completions: a prompt, and the text that goes on with it


def completions_view(body: Body) -> View:
    text, uncacheable = _prompt(body)
    turns = [{"role": "user", "content": text}]
    words = text.strip()
    blanks = list(text.partition(words)[::2]) if words else [text]  # the answer goes on after a blank or without one
    return View(turns, ["completions", blanks, *beside(body, "prompt", turns)], uncacheable)


def _prompt(body: Body) -> tuple[str, str | None]:
    """The text of the prompt, "" when it is not text, and why the answer may not be kept."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt, None
    if prompt is None and body.get("prompt_embeds") is not None:
        return "", "the prompt is not text"
    if not isinstance(prompt, list) or not prompt:
        words = "is required" if prompt is None else "must be a string or a non-empty array"
        raise BadRequest(f"prompt {words}", param="prompt")
    if all(isinstance(part, str) for part in prompt):
        return "\n".join(prompt), "the prompt is not one string"
    if all(map(_is_token, prompt)) or all(isinstance(part, list) and all(map(_is_token, part)) for part in prompt):
        return "", "the prompt is not text"
    raise BadRequest("prompt must hold strings, or tokens, or arrays of tokens", param="prompt")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text_delta(choice: dict[str, Any]) -> dict[str, Any]:
    return {"content": choice.get("text")}


def from_text_completion(raw: bytes) -> Answer | None:
    match answers.loaded(raw):
        case {"model": str(model), "choices": [{"text": str(text), "finish_reason": "stop"}], **rest}:
            return answers.whole(model, {"content": text}, rest.get("usage"))
    return None


def text_completion(answer: Answer, new: Identity) -> bytes:
    choice = {"index": 0, "text": answer.message["content"], "logprobs": None, "finish_reason": answer.finish_reason}
    return orjson.dumps({**_completion_envelope(answer, new), "choices": [choice], "usage": answer.usage})


def text_completion_stream(answer: Answer, new: Identity, include_usage: bool) -> bytes:
    envelope = _completion_envelope(answer, new)
    parts = [(answer.message["content"], None), ("", answer.finish_reason)]
    chunks: list[dict[str, Any]] = [
        {**envelope, "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}
        for text, reason in parts
    ]
    if include_usage:
        chunks.append({**envelope, "choices": [], "usage": answer.usage})
    return b"".join(sse.event(orjson.dumps(chunk)) for chunk in chunks) + sse.DONE


def _completion_envelope(answer: Answer, new: Identity) -> dict[str, Any]:
    return {"id": new.id, "object": "text_completion", "created": new.created, "model": answer.model}


# Responses: items in, items out; an answer is kept as the whole object: one message of one text, or reasoning before it


def responses_view(body: Body) -> View:
    instructions = typed(body, "instructions", str, "a string")
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        words = "is required" if given is None else "must be a string or a non-empty array of items"
        raise BadRequest(f"input {words}", param="input")
    turns = [_turn(item, f"input[{i}]") for i, item in enumerate(items)]
    system = [{"role": "system", "content": instructions}] if instructions else []
    return View([*system, *turns], ["responses", *beside(body, "input", items, ())], _stateful(body), ())


def _stateful(body: Body) -> str | None:
    """Why the answer is more than its text: what asks vLLM to keep something, or to go on with what it kept."""
    for key in ("previous_response_id", "conversation", "background", "store", "enable_response_messages"):
        if body.get(key):
            return f"{key} is asked for"
    return None


def _turn(item: object, path: str) -> Body:
    """An item of the input as a message of a chat."""
    if not isinstance(item, dict):
        raise BadRequest(f"{path} is not an object", param=path)
    kind = typed(item, "type", str, "a string", f"{path}.")
    if kind in (None, "message"):
        role = typed(item, "role", str, "a string", f"{path}.", required=True)
        return {"role": role, "content": _content(item.get("content"), f"{path}.content")}
    output = item.get("output")
    role = "tool" if kind.endswith("_output") else "assistant"
    if isinstance(output, list):  # of parts, a picture among them perhaps
        return {"role": role, "content": [{"type": "output"}]}
    return {"role": role, "content": output if isinstance(output, str) else None}


def _content(content: object, path: str) -> str | list[Body]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{path} must be a string or an array of parts", param=path)
    return [_part(part, f"{path}[{i}]") for i, part in enumerate(content)]


def _part(part: object, path: str) -> Body:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRequest(f"{path} must be an object with a type", param=path)
    if part["type"] not in ("input_text", "output_text", "text"):
        return {"type": part["type"]}
    return {"type": "text", "text": typed(part, "text", str, "a string", f"{path}.", required=True)}


def from_response(raw: bytes) -> Answer | None:
    return _response(answers.loaded(raw))


def _response(response: Any) -> Answer | None:
    """The answer in a response object. Its `message` is all of the object."""
    match response:
        case {
            "object": "response",
            "status": "completed",
            "model": str(model),
            "output": [*thoughts, {"type": "message", "role": "assistant", "content": [part]}],
            **rest,
        } if _is_text(part, "output_text") and _is_one_thought(thoughts):
            kept = {key: value for key, value in response.items() if key not in PASSING_FIELDS}
            return Answer(model, kept, "completed", answers.figures(rest.get("usage"))) if _can_be_kept(kept) else None
    return None


def _is_one_thought(items: list[Any]) -> bool:
    """Whether what comes before the message is reasoning in one text, or nothing."""
    match items:
        case []:
            return True
        case [{"type": "reasoning", "content": [part], **rest}]:
            return _is_text(part, "reasoning_text") and answers.telling(rest).keys() <= {"id", "status"}
    return False


def _can_be_kept(response: Body) -> bool:
    try:
        return len(orjson.dumps(response)) <= answers.MAX_ANSWER_CHARACTERS
    except orjson.JSONEncodeError:  # nested more deeply than orjson writes
        return False


class ResponseAssembly(Assembly):
    """The event that ends the stream holds all of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self._response: object = None

    def _fold(self, event: dict[str, Any]) -> bool:
        if event.get("type") == "response.completed" and not self.done:
            self._response, self.done = event.get("response"), True
        return isinstance(event.get("type"), str) and event["type"] not in ("error", "response.failed")

    def _whole(self) -> Answer | None:
        return _response(self._response)


def response(answer: Answer, new: Identity) -> bytes:
    return orjson.dumps(_renewed(answer, new))


def _renewed(answer: Answer, new: Identity) -> Body:
    """The response object as a new one."""
    prefixes, own = {"reasoning": "rs_", "message": "msg_"}, new.id.removeprefix(RESPONSES.id_prefix)
    output = [{**item, "id": prefixes[item["type"]] + own} for item in answer.message["output"]]
    return {**answer.message, "id": new.id, "created_at": new.created, "output": output}


def response_stream(answer: Answer, new: Identity, include_usage: bool) -> bytes:
    whole = _renewed(answer, new)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    events: list[tuple[str, Body]] = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
        *(event for i, item in enumerate(whole["output"]) for event in _item_events(item, i)),
        ("response.completed", {"response": whole}),
    ]
    return b"".join(
        sse.event(orjson.dumps({"type": name, "sequence_number": i, **fields}), name)
        for i, (name, fields) in enumerate(events)
    )


def _item_events(item: Body, index: int) -> list[tuple[str, Body]]:
    """The events of an item that is one text."""
    (part,) = item["content"]
    name, at = f"response.{part['type']}", {"item_id": item["id"], "output_index": index, "content_index": 0}
    beside: Body = {"logprobs": []} if part["type"] == "output_text" else {}
    begun = {**item, "status": "in_progress", "content": []}
    return [
        ("response.output_item.added", {"output_index": index, "item": begun}),
        ("response.content_part.added", {**at, "part": {**part, "text": ""}}),
        (f"{name}.delta", {**at, "delta": part["text"], **beside}),
        (f"{name}.done", {**at, "text": part["text"], **beside}),
        ("response.content_part.done", {**at, "part": part}),
        ("response.output_item.done", {"output_index": index, "item": item}),
    ]


# Messages: Anthropic's form


def messages_view(body: Body) -> View:
    system = body.get("system")
    if system is not None:
        system = _content(system, "system")
    messages = checked_messages(body)
    before = [{"role": "system", "content": system}] if system else []
    around = beside(body, "messages", messages, MESSAGES_USER)
    return View([*before, *messages], ["messages", *around], user_fields=MESSAGES_USER)


def from_message(raw: bytes) -> Answer | None:
    match answers.loaded(raw):
        case {
            "type": "message",
            "role": "assistant",
            "model": str(model),
            "content": list(blocks),
            "stop_reason": "end_turn",
            "usage": dict(usage),
        }:
            return _message(model, blocks, usage)
    return None


def _message(model: str, blocks: list[Any], usage: Body) -> Answer | None:
    told = _told(blocks)
    answer = answers.whole(model, told, usage, "end_turn") if told else None
    counted = answer is not None and len(by_kind(answer.usage or {})) == 2
    return answer if counted else None  # a message without its usage is none that a client takes


def _told(blocks: list[Any]) -> Body | None:
    """The content of a message that is a text, or thinking and a text."""
    match blocks:
        case [text] if _is_text(text, "text"):
            return {"content": text["text"]}
        case [{"type": "thinking", "thinking": thinking, "signature": signature}, text] if _is_text(text, "text"):
            return {"content": text["text"], "thinking": thinking, "signature": signature}
    return None


class MessageAssembly(Assembly):
    def __init__(self) -> None:
        super().__init__()
        self._model: str | None = None
        self._blocks: list[dict[str, list[str]]] = []  # the pieces of their fields
        self._usage: Body = {}
        self._stop_reason: object = None

    def _fold(self, event: dict[str, Any]) -> bool:
        match event:
            case {"type": "message_start", "message": {"model": str(model), "content": [], "usage": dict(usage)}}:
                known, self._model = self._model, model
                self._usage |= usage
                return known is None
            case {"type": "content_block_start", "index": index, "content_block": {"type": str(kind), **beside}}:
                self._blocks.append({"type": [kind], kind: []})
                return index == len(self._blocks) - 1 and not answers.telling(beside)
            case {"type": "content_block_delta", "index": index, "delta": {"type": str(), **pieces}}:
                return self._stop_reason is None and index == len(self._blocks) - 1 >= 0 and self._add_pieces(pieces)
            case {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": dict(usage)}:
                self._stop_reason = reason
                self._usage |= {key: value for key, value in usage.items() if value is not None}
            case {"type": "message_stop"}:
                self.done = True
            case {"type": "content_block_stop" | "ping"}:
                pass
            case _:
                return False
        return True

    def _add_pieces(self, pieces: Mapping[Any, Any]) -> bool:
        """Add to the fields of the newest block; False when it is not text."""
        for key, value in pieces.items():
            self._blocks[-1].setdefault(key, []).append(value)
        return all(isinstance(value, str) for value in pieces.values())

    def _whole(self) -> Answer | None:
        if self._model is None or self._stop_reason != "end_turn":
            return None
        blocks = [{key: "".join(pieces) for key, pieces in block.items()} for block in self._blocks]
        return _message(self._model, blocks, self._usage)


def message(answer: Answer, new: Identity) -> bytes:
    return orjson.dumps(_message_object(answer, new, _blocks(answer), answer.finish_reason, answer.usage))


def _blocks(answer: Answer) -> list[Body]:
    thinking: Body = {key: answer.message[key] for key in ("thinking", "signature") if key in answer.message}
    before: list[Body] = [{"type": "thinking", **thinking}] if thinking else []
    return [*before, {"type": "text", "text": answer.message["content"]}]


def _message_object(answer: Answer, new: Identity, content: list[Body], reason: str | None, usage: Body | None) -> Body:
    start = {"id": new.id, "type": "message", "role": "assistant", "content": content, "model": answer.model}
    return {**start, "stop_reason": reason, "stop_sequence": None, "usage": usage}


def message_stream(answer: Answer, new: Identity, include_usage: bool) -> bytes:
    begun = _message_object(answer, new, [], None, {**(answer.usage or {}), "output_tokens": 0})
    end = {"stop_reason": answer.finish_reason, "stop_sequence": None}
    events: list[Body] = [
        {"type": "message_start", "message": begun},
        *(event for i, block in enumerate(_blocks(answer)) for event in _block_events(block, i)),
        {"type": "message_delta", "delta": end, "usage": answer.usage},
        {"type": "message_stop"},
    ]
    return b"".join(sse.event(orjson.dumps(event), event["type"]) for event in events)


def _block_events(block: Body, index: int) -> list[Body]:
    kind = block["type"]
    deltas = [{"type": f"{key}_delta", key: value} for key, value in block.items() if key != "type"]
    return [
        {"type": "content_block_start", "index": index, "content_block": {"type": kind, kind: ""}},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


# What they share


def _is_text(part: object, kind: str) -> bool:
    """Whether a part is text and nothing beside."""
    if not isinstance(part, dict):
        return False
    told = answers.telling(part)
    return told.keys() == {"type", "text"} and told["type"] == kind and isinstance(told["text"], str)


CHAT = Form(
    path=overrides.CHAT,
    view=chat_view,
    whole=answers.from_completion,
    assembly=ChunkAssembly,
    replay=answers.completion,
    stream=answers.events,
    id_prefix="chatcmpl-",
    asks_usage=True,
)
COMPLETIONS = Form(
    path=overrides.COMPLETIONS,
    view=completions_view,
    whole=from_text_completion,
    assembly=lambda: ChunkAssembly(_text_delta),
    replay=text_completion,
    stream=text_completion_stream,
    id_prefix="cmpl-",
    asks_usage=True,
)
RESPONSES = Form(
    path=overrides.RESPONSES,
    view=responses_view,
    whole=from_response,
    assembly=ResponseAssembly,
    replay=response,
    stream=response_stream,
    id_prefix="resp_",
    asks_usage=False,
)
MESSAGES = Form(
    path=overrides.MESSAGES,
    view=messages_view,
    whole=from_message,
    assembly=MessageAssembly,
    replay=message,
    stream=message_stream,
    id_prefix="msg_",
    asks_usage=False,
)
FORMS = {form.path: form for form in (CHAT, COMPLETIONS, RESPONSES, MESSAGES)}
