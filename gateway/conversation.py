"""What the policy reads of a conversation: its user turns, each with some of what was said before; no I/O.

A follow-up such as "and in French?" says little by itself, and an agent's harness puts much into a user turn that the
user did not say. So each turn is cleaned of what harnesses add, and read together with the turns before it. This is for
the policy only: the question that the cache compares, and what is sent to the model, stay as they came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from gateway.request import BYTES_PER_TOKEN, Body, text_of

READ_CHARACTERS = 1000  # of a turn and those before it; about what the classifier reads in one window
EARLIER_TURNS = 6  # that are looked at beside the newest: the first, and the latest
SEARCHED_CHARACTERS = 250_000  # of all turns together that are looked through, from the newest back

# What coding agents and other harnesses put around what the user did not say; `-` and `_` are the same.
# fmt: off
HARNESS_TAGS = frozenset({
    "system_reminder", "system_notification", "system_warning", "reminder", "reminderinstructions", "env",
    "environment", "environment_context", "environment_details", "environment_info", "user_info", "user_instructions",
    "user_rules", "workspace_info", "workspace_context", "project_layout", "project_context", "git_status",
    "editor_context", "editorcontext", "open_files", "open_and_recently_viewed_files", "attached_files",
    "attachments", "additional_data", "ide_opened_file", "ide_selection", "ide_diagnostics", "new_diagnostics",
    "command_name", "command_message", "command_contents", "local_command_stdout", "local_command_stderr",
    "local_command_caveat", "bash_stdout", "bash_stderr", "user_prompt_submit_hook", "task_notification",
    "turn_aborted", "tool_result", "tool_results", "tool_response", "tool_responses", "tool_output", "tool_use_error",
    "function_result", "function_results", "function_response", "function_call_output",
})
# fmt: on
_TAG = re.compile(r"<(/?)([A-Za-z][\w-]{0,40})(?:\s[^<>]{0,500})?>")
# Looked up by comparison: the `type` of a JSON schema may be a list.
IMAGE_PARTS = ("image_url", "input_image", "image", "image_pil", "image_embeds")
MEDIA_PARTS = (*IMAGE_PARTS, "input_audio", "audio_url", "video_url", "file", "input_file", "document")
CONTEXT_FIELDS = ("messages", "input", "prompt", "instructions", "system", "tools", "functions")


@dataclass(frozen=True, slots=True)
class Turn:
    """A user turn as the policy sees it."""

    text: str  # what the user says in it; of more than SEARCHED_CHARACTERS the beginning and the end
    read: str  # the same after what was said before it: what the models read
    prompt_tokens: int  # of all messages up to it


def turns(messages: Sequence[Body]) -> tuple[Turn, ...]:
    """The newest user turn, last, and before it at most EARLIER_TURNS earlier ones that say something.

    A newest turn in which the user says nothing is read as those before it. When no turn says anything, the newest is
    taken as it is; without a user turn there are none.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        return ()
    said = _said(messages, users)
    newest = users[-1]
    if not any(said.values()):
        said = {newest: text_of(messages[newest]).strip()}
    spoken = [i for i, text in said.items() if text and i != newest]
    earlier = spoken if len(spoken) <= EARLIER_TURNS else [spoken[0], *spoken[1 - EARLIER_TURNS :]]
    sizes = list(accumulate(len(text_of(message).encode()) for message in messages))
    end = len(messages) - 1  # what follows the newest user turn, such as results of tools, belongs to it
    return tuple(
        Turn(_bounded(said[i]), _read(said, i), sizes[at] // BYTES_PER_TOKEN)
        for i, at in (*((i, i) for i in earlier), (newest, end))
    )


def context_tokens(body: Body) -> int:
    """What a model reads of a body, at 4 bytes a token: all that is said, and the tools; not images and files."""
    return sum(_size(body.get(key)) for key in CONTEXT_FIELDS) // BYTES_PER_TOKEN


def _size(value: object) -> int:
    """The bytes of all text in a JSON value, keys and numbers included."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list):
        return sum(map(_size, value))
    if not isinstance(value, dict):
        return 0 if value is None else BYTES_PER_TOKEN
    if value.get("type") in MEDIA_PARTS:
        return 0
    return sum(len(key) + _size(part) for key, part in value.items())


def has_tools(body: Body) -> bool:
    return bool(body.get("tools") or body.get("functions"))


def has_images(messages: Iterable[object]) -> bool:
    """Whether there is an image in messages, or in their parts, such as results of tools."""
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = [part for content in contents if isinstance(content, list) for part in content]
    here = any(isinstance(part, dict) and part.get("type") in IMAGE_PARTS for part in parts)
    return here or (bool(parts) and has_images(parts))


def cleaned(text: str) -> str:
    """The text without what stands between the tags of a harness; a tag that is not closed is left as it is."""
    if "</" not in text:
        return text.strip()
    opened: dict[str, list[int]] = {}
    spans: list[tuple[int, int]] = []
    for tag in _TAG.finditer(text):
        name = tag[2].lower().replace("-", "_")
        if name not in HARNESS_TAGS:
            continue
        starts = opened.setdefault(name, [])
        if not tag[1]:
            starts.append(tag.start())
        elif starts:
            spans.append((starts.pop(), tag.end()))
    return _without(text, spans).strip()


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """The text outside of the spans, which may lie in one another."""
    kept, at = [], 0
    for start, end in sorted(spans):
        if start > at:
            kept.append(text[at:start])
        at = max(at, end)
    return "".join([*kept, text[at:]])


def _said(messages: Sequence[Body], users: Sequence[int]) -> dict[int, str]:
    """What the user says in each turn, oldest first: as many of the latest as are looked through, and the first."""
    said: dict[int, str] = {}
    left = SEARCHED_CHARACTERS
    for i in (*reversed(users[1:]), users[0]):
        if left > 0 or i == users[0]:
            whole = text_of(messages[i]).strip()
            searched = _bounded(whole)
            words = cleaned(searched)
            said[i] = whole if words == searched else words
            left -= len(searched)
    return dict(sorted(said.items()))


def _bounded(text: str) -> str:
    """A text that is looked through in no time: of a longer one the beginning and the end."""
    half = SEARCHED_CHARACTERS // 2
    return text if len(text) <= SEARCHED_CHARACTERS else f"{text[: half - 1]}\n{text[-half:]}"


def _read(said: dict[int, str], newest: int) -> str:
    """A turn after those before it, as far as READ_CHARACTERS go; of the one that is cut, its beginning."""
    parts: list[str] = []
    room = READ_CHARACTERS
    for i in reversed([i for i in said if i <= newest and said[i]]):
        if room <= 0:
            break
        parts.append(said[i][:room] if parts else said[i])
        room -= len(parts[-1]) + 1
    return "\n".join(reversed(parts))
