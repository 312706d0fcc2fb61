"""The clients of `bench.scopes`: each asks, again where a part was just killed, and checks what it gets."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import count

import aiohttp

from bench.scope_checks import GENERATED, REPLAYED, Broken, Sent, Unavailable, judged, received, refused
from bench.scope_requests import Asked, Requests

GATEWAYS = ("gateway-a", "gateway-b")
CHAT = "/v1/chat/completions"
ANSWER_SECONDS = 60  # of a try
PATIENCE_SECONDS = 180  # of a request, with all its tries
RETRY_SECONDS = 0.1
EXPIRY_SECONDS = 2.5  # after which an answer of ttl=1 is not there any more
EACH_EXPIRY = 150  # requests, of which one is asked again after that
SHOWN = 20  # violations
# What may become of a connection whose other end is killed.
LOST = (aiohttp.ClientError, OSError, TimeoutError)


class Tally:
    """What became of the requests."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()  # by why
        self.events: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()
        self.shown: list[str] = []

    @property
    def hits(self) -> float:
        """Their share of all answers."""
        answers = sum(self.outcomes[name] for name in GENERATED + REPLAYED)
        return sum(self.outcomes[name] for name in REPLAYED) / answers if answers else 0.0

    def violated(self, kind: str, words: str) -> None:
        self.violations[kind] += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{kind}: {words}")
            print(f"scopes: VIOLATION {kind}: {words}", flush=True)


class Pace:
    """How many requests may have been sent by now, so that each event falls into its share of them."""

    def __init__(self, requests: int, limit: float) -> None:
        self.requests = requests
        self.sent = 0
        self.limit = limit

    async def permits(self) -> bool:
        """Whether one more is to be sent; waits until it may be."""
        while self.limit <= self.sent < self.requests:  # noqa: ASYNC110 (the pace of the clients is no figure here)
            await asyncio.sleep(0.02)
        return self.sent < self.requests

    async def reaches(self, number: float) -> None:
        while self.sent < number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


class Clients:
    """What they share: whom they ask, all that they have sent, and what became of it."""

    def __init__(self, addresses: Mapping[str, str], keys: Mapping[str, str], requests: Requests, pace: Pace) -> None:
        self.tally = Tally()
        self.origins: dict[str, Sent] = {}
        self._addresses = addresses
        self._keys = keys
        self._requests = requests
        self._pace = pace

    async def run(self, concurrency: int) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._client(session))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while await self._pace.permits():
            is_brief = (self._pace.sent + 1) % EACH_EXPIRY == 0
            asked = self._requests.next()[: 1 if is_brief else None]
            self._pace.sent += len(asked)
            number = self._pace.sent
            if is_brief:
                await self._expiry(session, asked[0], number)
            else:
                await asyncio.gather(*(self._ask(session, one, number - i) for i, one in enumerate(asked)))

    async def _expiry(self, session: aiohttp.ClientSession, asked: Asked, number: int) -> None:
        """The same before and after the answer has expired."""
        brief = replace(asked, control="no-cache, ttl=1", kind="plain", leaves=False)
        await self._ask(session, brief, number)
        await asyncio.sleep(EXPIRY_SECONDS)
        self._pace.sent += 1
        await self._ask(session, replace(brief, control=""), self._pace.sent)

    async def _ask(self, session: aiohttp.ClientSession, asked: Asked, number: int) -> None:
        """One request, tried until a gateway answers it."""
        began = time.monotonic()
        for tried in count():
            gateway = GATEWAYS[(number + tried) % len(GATEWAYS)]
            sent = Sent(f"{number}.{tried}-{asked.kind}", asked, gateway, time.time())
            self.origins[sent.id] = sent
            try:
                return await self._try(session, sent)
            except (Broken, Unavailable, *LOST) as error:
                self.tally.retries[why(error)] += 1
            if time.monotonic() - began > PATIENCE_SECONDS:
                return self._violated(sent, "unanswered", f"after {tried + 1} tries")
            await asyncio.sleep(RETRY_SECONDS * min(tried + 1, 10))
        return None

    async def _try(self, session: aiohttp.ClientSession, sent: Sent) -> None:
        """Raises `Broken`, `Unavailable` and what is LOST: it is to be asked again."""
        headers = {"Authorization": f"Bearer {self._keys[sent.asked.tenant]}", "x-request-id": sent.id}
        if sent.asked.control:
            headers["x-fingerpost-cache-control"] = sent.asked.control
        url = self._addresses[sent.gateway] + CHAT
        async with session.post(url, json=sent.asked.body, headers=headers) as response:
            outcome = response.headers.get("x-fingerpost-cache", "none")
            if sent.asked.leaves and response.status == 200:
                await response.content.readany()
                response.close()
                self.tally.outcomes["left"] += 1
                return
            if response.status != 200:
                await self._refused(sent, response)
                return
            try:
                raw = await response.read()
            except aiohttp.ClientPayloadError:
                if not breaks(sent, outcome):
                    raise
                self.tally.outcomes["broken, as told"] += 1
                return
        self._take(sent, raw, response.headers)

    async def _refused(self, sent: Sent, response: aiohttp.ClientResponse) -> None:
        """Raises `Unavailable`."""
        found = list(refused(sent, response.status))
        for kind, words in found:
            self._violated(sent, kind, f"{words}: {(await response.text())[:200]}")
        self.tally.outcomes["refused" if found else "failed, as told"] += 1

    def _take(self, sent: Sent, raw: bytes, headers: Mapping[str, str]) -> None:
        """Raises `Broken` where another's stream was read that nobody can ask anything of."""
        sent.finished = time.time()
        outcome = headers.get("x-fingerpost-cache", "none")
        try:
            got = received(raw, headers, streams=sent.asked.streams)
        except Broken as error:
            if outcome == "joined":
                raise
            if not breaks(sent, outcome):
                self._violated(sent, "partial", f"{error}; {outcome}; {len(raw)} bytes that end with {raw[-80:]!r}")
            self.tally.outcomes["broken, as told"] += breaks(sent, outcome)
            return
        self.tally.outcomes["joined, cut" if outcome == "joined" and got.finish_reason == "length" else outcome] += 1
        for kind, words in judged(sent, got, self.origins):
            self._violated(sent, kind, f"{words}; {outcome}; the answer begins with {got.content[:240]!r}")

    def _violated(self, sent: Sent, kind: str, words: str) -> None:
        asked = sent.asked
        who = f"{sent.id} of {asked.tenant} at {sent.gateway} at {sent.started:.2f}"
        what = f"{asked.question!r}, {asked.conversation}, {asked.control or 'no control'}, streams {asked.streams}"
        self.tally.violated(kind, f"{words} | {who}: {what}")


def breaks(sent: Sent, outcome: str) -> bool:
    """Whether the stub was told to break off what it generated for this request."""
    return sent.asked.kind in ("break", "unended", "error") and outcome in GENERATED


def why(error: Exception) -> str:
    """Of another try."""
    if isinstance(error, Broken):
        return f"joined: {error}"
    return str(error) if isinstance(error, Unavailable) else type(error).__name__
