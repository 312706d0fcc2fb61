"""What the stub vLLM says in the forms beside chat completions, field by field as vLLM 0.32 writes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

PATHS = ("/v1/completions", "/v1/responses", "/v1/messages")
CALL = {"name": "look_up", "arguments": '{"word": "fjord"}'}


@dataclass(frozen=True)
class Form:
    question: Callable[[Body], str]
    whole: Callable[[Body, str, str], Body]  # of the request, the text and the fault
    events: Callable[[Body, str, str], list[tuple[str, Body]]]  # (name or "", payload)


def named(name: str, payload: Body) -> bytes:
    head = f"event: {name}\n" if name else ""
    return head.encode() + b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def pieces(text: str) -> list[str]:
    return [text[i : i + 7] for i in range(0, len(text), 7)]


def frames(path: str, body: Body, text: str, fault: str) -> list[bytes]:
    events = [named(*event) for event in FORMS[path].events(body, text, fault)]
    if fault == "break":
        return events[:3]
    if fault == "error-event":
        error = {"type": "error", "error": {"type": "internal_error", "message": "engine died"}}
        return [*events[:3], named("error" if path != "/v1/completions" else "", error)]
    return events if path != "/v1/completions" or fault == "no-done" else [*events, b"data: [DONE]\n\n"]


def last_user_text(turns: str | list[Body]) -> str:
    if isinstance(turns, str):
        return turns
    contents = (turn.get("content") for turn in reversed(turns) if turn.get("role") == "user")
    content = next(contents, "")
    return content if isinstance(content, str) else " ".join(str(part.get("text", "")) for part in content or [])


# Completions

USAGE = {"prompt_tokens": 11, "total_tokens": 31, "completion_tokens": 20, "prompt_tokens_details": None}


def text_envelope(body: Body) -> Body:
    return {"id": "cmpl-stub", "object": "text_completion", "created": int(time.time()), "model": body["model"]}


def text_choice(text: str, reason: str | None) -> Body:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}


def text_completion(body: Body, text: str, fault: str) -> Body:
    choice = {**text_choice(text, "length" if fault == "length" else "stop"), "prompt_logprobs": None}
    return {**text_envelope(body), "choices": [choice], "service_tier": None, "usage": USAGE}


def text_chunks(body: Body, text: str, fault: str) -> list[tuple[str, Body]]:
    reason = "length" if fault == "length" else "stop"
    choices = [*(text_choice(piece, None) for piece in pieces(text)), text_choice("", reason)]
    chunks: list[Body] = [{**text_envelope(body), "choices": [choice]} for choice in choices]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**text_envelope(body), "choices": [], "usage": USAGE})
    return [("", chunk) for chunk in chunks]


# Responses


def response_usage() -> Body:
    read = {"cached_tokens": 0, "cache_write_tokens": 0, "input_tokens_per_turn": [], "cached_tokens_per_turn": []}
    written = {"reasoning_tokens": 0, "tool_output_tokens": 0, "output_tokens_per_turn": []}
    counts = {"input_tokens": 11, "output_tokens": 20, "total_tokens": 31}
    return {**counts, "input_tokens_details": read, "output_tokens_details": written}


def response(body: Body, output: list[Body], status: str) -> Body:
    return {
        "id": "resp_stub",
        "created_at": int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": body["model"],
        "object": "response",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": body.get("tools", []),
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": 100,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": status,
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": response_usage() if status != "in_progress" else None,
        "user": body.get("user"),
    }


def output_text(text: str) -> Body:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}


def output_item(text: str) -> Body:
    part = output_text(text)
    return {"id": "msg_stub", "content": [part], "role": "assistant", "status": "completed", "type": "message"}


def function_call() -> Body:
    return {**CALL, "call_id": "call_1", "type": "function_call", "id": "fc_stub", "status": "completed"}


def whole_response(body: Body, text: str, fault: str) -> Body:
    item = function_call() if fault == "tool-call" else output_item(text)
    return response(body, [item], "incomplete" if fault == "length" else "completed")


def response_events(body: Body, text: str, fault: str) -> list[tuple[str, Body]]:
    whole, begun = whole_response(body, text, fault), response(body, [], "in_progress")
    item, at = whole["output"][0], {"output_index": 0}
    part = {**at, "item_id": item["id"], "content_index": 0}
    if fault == "tool-call":
        inner: list[tuple[str, Body]] = [
            ("response.output_item.added", {**at, "item": {**item, "arguments": "", "status": "in_progress"}}),
            *(
                ("response.function_call_arguments.delta", {**at, "item_id": item["id"], "delta": piece})
                for piece in pieces(item["arguments"])
            ),
            (
                "response.function_call_arguments.done",
                {**at, "item_id": item["id"], "name": item["name"], "arguments": item["arguments"]},
            ),
        ]
    else:
        inner = [
            ("response.output_item.added", {**at, "item": {**item, "content": [], "status": "in_progress"}}),
            ("response.content_part.added", {**part, "part": output_text("")}),
            *(("response.output_text.delta", {**part, "delta": piece, "logprobs": []}) for piece in pieces(text)),
            ("response.output_text.done", {**part, "text": text, "logprobs": []}),
            ("response.content_part.done", {**part, "part": output_text(text)}),
        ]
    events = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
        *inner,
        ("response.output_item.done", {**at, "item": item}),
        ("response.completed", {"response": whole}),
    ]
    return [(name, {**payload, "sequence_number": i, "type": name}) for i, (name, payload) in enumerate(events)]


# Messages

ANTHROPIC_USAGE = {"input_tokens": 11, "output_tokens": 20}
STOP_REASONS = {"length": "max_tokens", "tool-call": "tool_use"}


def tool_use() -> Body:
    return {"type": "tool_use", "id": "call_1", "name": CALL["name"], "input": json.loads(CALL["arguments"])}


def message(body: Body, content: list[Body]) -> Body:
    return {"id": "chatcmpl-stub", "type": "message", "role": "assistant", "content": content, "model": body["model"]}


def whole_message(body: Body, text: str, fault: str) -> Body:
    content = [tool_use()] if fault == "tool-call" else [{"type": "text", "text": text}]
    reason = STOP_REASONS.get(fault, "end_turn")
    return {**message(body, content), "stop_reason": reason, "usage": ANTHROPIC_USAGE}


def message_events(body: Body, text: str, fault: str) -> list[tuple[str, Body]]:
    start = {
        **message(body, []),
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**ANTHROPIC_USAGE, "output_tokens": 0},
    }
    if fault == "tool-call":
        block: Body = {**tool_use(), "input": {}}
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces(CALL["arguments"])]
    else:
        block = {"type": "text", "text": ""}
        deltas = [{"type": "text_delta", "text": piece} for piece in pieces(text)]
    end = {"stop_reason": STOP_REASONS.get(fault, "end_turn"), "stop_sequence": None}
    events: list[Body] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": ANTHROPIC_USAGE},
        {"type": "message_stop"},
    ]
    return [(event["type"], event) for event in events]


FORMS = {
    "/v1/completions": Form(lambda body: str(body.get("prompt")), text_completion, text_chunks),
    "/v1/responses": Form(lambda body: last_user_text(body["input"]), whole_response, response_events),
    "/v1/messages": Form(lambda body: last_user_text(body["messages"]), whole_message, message_events),
}
