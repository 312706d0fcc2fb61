"""Server-sent events: a stream cut anywhere gives the same events, and the same bytes."""

from __future__ import annotations

import time

import pytest

from gateway.sse import DONE, FrameSplitter, data, event

# As vLLM streams it: a chunk with the role, chunks with text (one with line breaks and non-Latin words in it), the
# chunk that ends it, usage, [DONE].
PAYLOADS = [
    b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"smollm2-small","choices":'
    b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}',
    b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"smollm2-small","choices":'
    b'[{"index":0,"delta":{"content":"Solar,\\n\\ndata: wind"},"logprobs":null,"finish_reason":null}]}',
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"smollm2-small","choices":'
    '[{"index":0,"delta":{"content":" и вода 🌊"},"logprobs":null,"finish_reason":null}]}'.encode(),
    b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"smollm2-small","choices":'
    b'[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}',
    b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"smollm2-small","choices":[],'
    b'"usage":{"prompt_tokens":31,"total_tokens":40,"completion_tokens":9}}',
    b"[DONE]",
]
LF = b"".join(b"data: " + payload + b"\n\n" for payload in PAYLOADS)
CRLF = b"".join(b"data: " + payload + b"\r\n\r\n" for payload in PAYLOADS)


def split(*chunks: bytes) -> tuple[list[bytes], bytes]:
    """The frames, and what is left over."""
    splitter = FrameSplitter()
    return [frame for chunk in chunks for frame in splitter.feed(chunk)], splitter.flush()


@pytest.mark.parametrize("stream", [LF, CRLF], ids=["LF", "CRLF"])
def test_a_stream_cut_at_any_byte(stream: bytes) -> None:
    for i in range(len(stream) + 1):
        frames, rest = split(stream[:i], stream[i:])
        assert b"".join(frames) == stream
        assert [data(frame) for frame in frames] == PAYLOADS
        assert rest == b""


@pytest.mark.parametrize("stream", [LF, CRLF], ids=["LF", "CRLF"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_in_small_pieces(stream: bytes, size: int) -> None:
    frames, rest = split(*(stream[i : i + size] for i in range(0, len(stream), size)))
    assert b"".join(frames) == stream
    assert [data(frame) for frame in frames] == PAYLOADS
    assert rest == b""


def test_an_event_comes_out_as_soon_as_it_is_whole() -> None:
    splitter = FrameSplitter()
    assert splitter.feed(b"data: 1\n") == []
    assert splitter.feed(b"\ndata: 2") == [b"data: 1\n\n"]
    assert splitter.feed(b"\n\n") == [b"data: 2\n\n"]


@pytest.mark.parametrize("stream", [LF, CRLF], ids=["LF", "CRLF"])
def test_a_stream_that_is_broken_off(stream: bytes) -> None:
    for end in range(len(stream)):
        frames, rest = split(stream[:end])
        assert b"".join(frames) + rest == stream[:end]
        assert [data(frame) for frame in frames] == PAYLOADS[: len(frames)]


def test_what_is_held_back_is_known_and_given_once() -> None:
    splitter = FrameSplitter()
    splitter.feed(b"data: 1\n\ndata: 2")
    assert splitter.pending == len(b"data: 2")
    assert splitter.flush() == b"data: 2"
    assert (splitter.pending, splitter.flush()) == (0, b"")


def test_an_event_in_many_pieces_takes_time_in_proportion_to_its_length() -> None:
    splitter, chunk = FrameSplitter(), b"x" * 1024
    started = time.process_time()
    for _ in range(512):
        splitter.feed(chunk)
    assert time.process_time() - started < 0.3
    assert splitter.pending == 512 * 1024


@pytest.mark.parametrize(
    ("frame", "payload"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\n\n", b"a"),
        (b"data:  a \n\n", b" a "),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\r\ndata: b\r\n\r\n", b"a\nb"),
        (b"event: x\nid: 1\ndata: a\n\n", b"a"),
        (b": a comment\n\n", b""),
        (b"data:\n\n", b""),
        (b"\n\n", b""),
    ],
)
def test_the_payload_is_in_the_data_lines(frame: bytes, payload: bytes) -> None:
    assert data(frame) == payload


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_is_written_is_read_again(payload: bytes) -> None:
    assert split(event(payload)) == ([event(payload)], b"")
    assert data(event(payload)) == payload


def test_done() -> None:
    assert event(b"[DONE]") == DONE
