"""Answers put into the cache of a gateway that runs, and written out of it.

`python -m gateway warm FAQ.jsonl` loads pairs of questions and answers, or what `python -m gateway export FILE.jsonl`
has written. `-` is standard input or output. The operators' key, where there is one, is in an environment variable.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
import orjson

ENTRIES = "/admin/cache/entries"
BATCH_ROWS = 100
BATCH_BYTES = 1024 * 1024
SECONDS = 300.0  # for one request
CROWDED_ROWS = 10_000  # as many with one prefix are asked for with longer ones: Milvus gives 16,384 at the most
FIRST_DIGITS = 2
MOST_DIGITS = 8
DIGITS = "0123456789abcdef"
PRIVATE = 0o600  # what is written are questions and answers


class Refused(Exception):
    """What the gateway does not do, or that it does not answer; the message says it all."""


@dataclass(frozen=True, slots=True)
class Line:
    number: int  # in the file, from 1
    text: bytes


@dataclass(frozen=True, slots=True)
class Gateway:
    url: str
    session: aiohttp.ClientSession

    async def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The body of the answer. Raises `Refused`."""
        kind = {} if body is None else {"content-type": "application/x-ndjson"}
        try:
            asked = self.session.request(method, self.url + path, data=body, headers=kind, allow_redirects=False)
            async with asked as answer:
                said = await answer.read()
        except (aiohttp.ClientError, OSError) as error:  # a time-out is one, too
            raise Refused(f"the gateway does not answer: {str(error) or type(error).__name__}") from error
        if answer.status != 200:
            raise Refused(f"the gateway answers {answer.status}: {_message(said)}")
        return said


def _message(said: bytes) -> str:
    """Of an error in OpenAI's form, or the beginning of whatever else it is."""
    try:
        return str(orjson.loads(said)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return said[:200].decode(errors="replace")


@contextlib.asynccontextmanager
async def connected(url: str, key: str | None) -> AsyncIterator[Gateway]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        yield Gateway(url.rstrip("/"), session)


# Into the cache


def lines(file: IO[bytes], request: Any, tenant: str | None) -> Iterator[Line]:
    """Those that are not empty; a pair without a request or a tenant of its own has these."""
    for number, text in enumerate(file, 1):
        if text.strip():
            yield Line(number, _completed(text.strip(), request, tenant))


def _completed(text: bytes, request: Any, tenant: str | None) -> bytes:
    given = {"request": request, "tenant": tenant}
    added = {name: value for name, value in given.items() if value is not None}
    try:
        row = orjson.loads(text) if added else None
    except orjson.JSONDecodeError:
        return text  # which the gateway refuses, naming the line
    if not isinstance(row, dict) or "scope" in row or not (added.keys() - row.keys()):
        return text
    return orjson.dumps({**added, **row})


def batches(given: Iterator[Line], most_rows: int, most_bytes: int) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in given:
        if batch and (len(batch) == most_rows or size + len(line.text) + 1 > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line.text) + 1
    if batch:
        yield batch


async def warm(gateway: Gateway, given: Iterator[Line], name: str) -> bool:
    """Put them into the cache; whether all were taken. Raises `Refused` naming the lines that were on their way."""
    limits = orjson.loads(await gateway.ask("GET", "/admin/cache"))["limits"]
    stored = skipped = 0
    for batch in batches(given, min(BATCH_ROWS, limits["rows"]), min(BATCH_BYTES, limits["bytes"])):
        body = b"".join(line.text + b"\n" for line in batch)
        try:
            said = orjson.loads(await gateway.ask("POST", ENTRIES, body))
        except Refused as error:
            raise Refused(
                f"{name}:{batch[0].number}-{batch[-1].number}: {error}; {stored} were stored before"
            ) from error
        for each in said["skipped"]:
            print(f"{name}:{batch[each['line'] - 1].number}: not stored: {each['reason']}", file=sys.stderr)
        stored, skipped = stored + said["stored"], skipped + len(said["skipped"])
        print(f"{stored} stored, {skipped} not stored", file=sys.stderr)
    return not skipped


# Out of it


async def exported(gateway: Gateway, prefix: str = "") -> AsyncIterator[bytes]:
    """The rows of all whose keys begin so, by prefixes of FIRST_DIGITS digits, or more where they are many."""
    rows = await gateway.ask("GET", f"{ENTRIES}?prefix={prefix}") if len(prefix) >= FIRST_DIGITS else None
    if rows is not None and (rows.count(b"\n") < CROWDED_ROWS or len(prefix) == MOST_DIGITS):
        yield rows
        return
    for digit in DIGITS:
        async for each in exported(gateway, prefix + digit):
            yield each


async def export(gateway: Gateway, file: IO[bytes]) -> None:
    """Write all of them. Raises `Refused`."""
    count = asked = 0
    async for rows in exported(gateway):
        file.write(rows)
        count, asked = count + rows.count(b"\n"), asked + 1
        if asked % 64 == 0:
            print(f"{count} written", file=sys.stderr)
    print(f"{count} written, all there were", file=sys.stderr)


# The commands


@contextlib.contextmanager
def reading(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
    else:
        with open(name, "rb") as file:
            yield file


@contextlib.contextmanager
def writing(name: str) -> Iterator[IO[bytes]]:
    """The file is there when all of it has been written."""
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = f"{name}.part"
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE), "wb") as file:
        yield file
    os.replace(part, name)


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("file", metavar="FILE.jsonl", help="- for standard input or output")
    common.add_argument("--url", default="http://127.0.0.1:8801", help="of the gateway")
    common.add_argument(
        "--key-env", default="FINGERPOST_ADMIN_KEY", metavar="NAME", help="variable that holds the operators' key"
    )
    parser = argparse.ArgumentParser(prog="gateway", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    warm = commands.add_parser("warm", parents=[common], help="put answers into the cache")
    warm.add_argument("--request", metavar="FILE.json", help="what clients send beside the question, see docs/api.md")
    warm.add_argument("--tenant", metavar="NAME", help="whose answers they are")
    commands.add_parser("export", parents=[common], help="write out the answers in the cache")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when all was done, 1 when not; standard error says what."""
    given = parser().parse_args(arguments)
    try:
        return asyncio.run(_run(given))
    except Refused as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or given.file}: {error.strerror}", file=sys.stderr)
    except orjson.JSONDecodeError as error:
        print(f"{given.request}: is not valid JSON: {error}", file=sys.stderr)
    return 1


async def _run(given: argparse.Namespace) -> int:
    key = os.environ.get(given.key_env) or None
    async with connected(given.url, key) as gateway:
        if given.command == "export":
            with writing(given.file) as file:
                await export(gateway, file)
            return 0
        request = orjson.loads(Path(given.request).read_bytes()) if given.request else None  # noqa: ASYNC240
        with reading(given.file) as file:
            return 0 if await warm(gateway, lines(file, request, given.tenant), given.file) else 1
