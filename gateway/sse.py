"""Server-sent events as bytes; no I/O. The form is https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import re

DONE = b"data: [DONE]\n\n"

_BOUNDARY = re.compile(rb"\r?\n\r?\n")


class FrameSplitter:
    """Cuts a byte stream, however it arrives, after each event's blank line; the pieces join to the stream exactly."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes, each with its blank line."""
        buffer, frames, start = self._rest + chunk, [], 0
        for boundary in _BOUNDARY.finditer(buffer, max(0, len(self._rest) - 3)):  # one may have begun in the rest
            frames.append(buffer[start : boundary.end()])
            start = boundary.end()
        self._rest = buffer[start:]
        return frames

    def flush(self) -> bytes:
        """What has arrived of an event whose end has not."""
        rest, self._rest = self._rest, b""
        return rest

    @property
    def pending(self) -> int:
        """Bytes held back."""
        return len(self._rest)


def data(frame: bytes) -> bytes:
    """The payload of one event: its data lines, joined."""
    lines = (line for line in frame.splitlines() if line.startswith(b"data:"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def event(payload: bytes, name: str = "") -> bytes:
    """One event as bytes, with its name, if it has one, in a line before the data."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + payload + b"\n\n"
