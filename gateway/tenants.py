"""Who is asking, and how much they may: keys, and limits by the minute; no I/O.

A limit by the minute is a bucket that holds what a minute allows and fills steadily: all of it may be used at once, and
then as much as comes back. The state is one bucket or two and a count for each configured tenant, however many ask.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterable, MutableSequence, Sequence

from gateway.config import Tenant
from gateway.errors import LimitReached, ModelNotAllowed, Unauthenticated
from gateway.request import BYTES_PER_TOKEN
from gateway.tally import REQUESTS, TOKENS, Alone, Tally
from gateway.usage import by_kind, total, usage

KEY_PREFIX = "fp-"
KEY_BYTES = 32  # of randomness: a digest of it cannot be searched for
ENVELOPE_BYTES = 200  # of an event, around its text
BUSY_SECONDS = 1.0  # after which a tenant with too many requests at once may try again

Clock = Callable[[], float]
Headers = Iterable[tuple[bytes, bytes]]  # names in lower case, as ASGI has them


def new_key() -> str:
    return KEY_PREFIX + secrets.token_hex(KEY_BYTES)


def digest(key: str) -> str:
    """What the configuration holds instead of the key: its SHA-256, in hex."""
    return hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()


def offered_key(headers: Headers) -> str | None:
    """The key in `Authorization: Bearer` or `x-api-key`. Raises `Unauthenticated` when there are two."""
    keys = {value.strip() for name, value in headers if name == b"x-api-key"}
    for name, value in headers:
        scheme, _, key = value.partition(b" ")
        if name == b"authorization" and scheme.lower() == b"bearer":
            keys.add(key.strip())
    keys.discard(b"")
    if len(keys) > 1:
        raise Unauthenticated("the request offers two different API keys")
    return next((key.decode("latin-1") for key in keys), None)


def matches(key: str, sha256: str) -> bool:
    """Whether `sha256` is the digest of `key`; takes as long whichever it is."""
    return hmac.compare_digest(digest(key), sha256)


class Bucket:
    """Holds at most `limit` and regains it in a minute; what turns out dearer than thought leaves it in debt."""

    def __init__(self, limit: int, clock: Clock, cells: MutableSequence[float], first: int) -> None:
        """Of the cells, the first is the level that it had at the time in the next."""
        self.limit = limit
        self._clock = clock
        self._cells = cells
        self._level, self._at = first, first + 1

    @property
    def level(self) -> float:
        before = self._cells[self._at]
        now = max(before, self._clock())
        self._cells[self._level] = min(self.limit, self._cells[self._level] + (now - before) * self.limit / 60)
        self._cells[self._at] = now
        return self._cells[self._level]

    def take(self, amount: float) -> None:
        """Take, or give back when negative."""
        self._cells[self._level] = min(self.limit, self.level - amount)

    def seconds_until(self, amount: float) -> float:
        """How long until it holds `amount`; 0 when it does."""
        return max(0.0, (amount - self.level) * 60 / self.limit)


class Account:
    """What a tenant has left; all of its keys draw on it. Without a tenant there is no limit."""

    def __init__(self, tenant: Tenant | None, clock: Clock = time.monotonic, tally: Tally | None = None) -> None:
        """`tally`: what it has used; without one, nothing."""
        self.tenant = tenant
        self._tally = tally or Alone()("")
        self._requests = _bucket(tenant.requests_per_minute if tenant else None, clock, self._tally, REQUESTS)
        self._tokens = _bucket(tenant.tokens_per_minute if tenant else None, clock, self._tally, TOKENS)
        self._most_at_once = tenant.concurrent_requests if tenant else None

    @property
    def meters_tokens(self) -> bool:
        return self._tokens is not None

    def admit(self, *, counted: bool) -> Admission:
        """Let one request in. Raises `LimitReached`, which costs nothing."""
        if counted and self.tenant:
            with self._tally.lock():
                self._check_running()
                self._take_request()
                self._tally.run(1)
        return Admission(self, counted=counted)

    def leave(self) -> None:
        if self.tenant:
            with self._tally.lock():
                self._tally.run(-1)

    def take_tokens(self, tokens: int) -> None:
        """Raises `LimitReached` when there are not as many."""
        if self._tokens is None:
            return
        if tokens > self._tokens.limit:
            words = f"the prompt is about {tokens} tokens, more than the {self._tokens.limit} that a minute allows"
            raise LimitReached(words, kind="tokens", seconds=None)
        with self._tally.lock():
            if seconds := self._tokens.seconds_until(max(tokens, 1)):
                words = f"the limit of {self._tokens.limit} tokens per minute is reached"
                raise LimitReached(words, kind="tokens", seconds=seconds)
            self._tokens.take(tokens)

    def correct_tokens(self, tokens: int) -> None:
        if self._tokens is not None and tokens:
            with self._tally.lock():
                self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """What is left of each limit, as OpenAI tells it."""
        headers: dict[str, str] = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                with self._tally.lock():
                    level, seconds = bucket.level, bucket.seconds_until(bucket.limit)
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(level)))
                headers[f"x-ratelimit-reset-{kind}"] = duration(seconds)
        return headers

    def _check_running(self) -> None:
        if self._most_at_once is not None and self._tally.running >= self._most_at_once:
            words = f"the limit of {self._most_at_once} requests at once is reached"
            raise LimitReached(words, kind="requests", seconds=BUSY_SECONDS)

    def _take_request(self) -> None:
        if self._requests is None:
            return
        if seconds := self._requests.seconds_until(1):
            words = f"the limit of {self._requests.limit} requests per minute is reached"
            raise LimitReached(words, kind="requests", seconds=seconds)
        self._requests.take(1)


class Admission:
    """One request of a tenant, or of anybody where there are none; ends with its answer."""

    def __init__(self, account: Account, *, counted: bool = False) -> None:
        self._account = account
        self._counted = counted
        self._has_ended = False
        self._reserved = 0  # tokens of the prompt, about
        self._tokens_read = 0  # of the answer, about
        self.usage: dict[str, int] = {}  # as the answer tells it
        self.tokens = 0  # reserved, or spent once that is known

    @property
    def tenant(self) -> str | None:
        return self._account.tenant.name if self._account.tenant else None

    @property
    def meters_tokens(self) -> bool:
        """Whether it matters what the answer takes."""
        return self._account.meters_tokens

    def allows(self, model: str) -> bool:
        """Whether the tenant may ask for this model or alias."""
        tenant = self._account.tenant
        return tenant is None or tenant.models is None or model in tenant.models

    def check_model(self, model: str) -> None:
        """Raises `ModelNotAllowed`."""
        if not self.allows(model):
            raise ModelNotAllowed(f"tenant {self.tenant!r} may not use the model {model!r}", param="model")

    def reserve(self, tokens: int) -> None:
        """Take the tokens that the prompt is thought to have. Raises `LimitReached`."""
        self._account.take_tokens(tokens)
        self._reserved += tokens
        self.tokens += tokens

    def spent(self, tokens: int) -> None:
        """The tokens that were really taken, instead of those reserved."""
        self._account.correct_tokens(tokens - self.tokens)
        self.tokens = tokens

    def read(self, piece: bytes) -> None:
        """Learn what the answer takes from an event of a stream, or from the whole of it."""
        self._tokens_read += max(1, (len(piece) - ENVELOPE_BYTES) // BYTES_PER_TOKEN)
        self.usage |= usage(piece)

    def end(self, *, failed: bool) -> None:
        self._has_ended = True
        if failed:
            self.spent(0)
        else:
            self._settle()
        if self._counted:
            self._account.leave()

    def over(self) -> int:
        """Nothing more is read: if the request has ended before, charge the rest; how many tokens more that is."""
        before = self.tokens
        if self._has_ended:
            self._settle()
        return self.tokens - before

    def _settle(self) -> None:
        if self._tokens_read:
            prompt = max(self._reserved, by_kind(self.usage).get("prompt", 0))
            self.spent(total(self.usage) or prompt + self._tokens_read)


class Tenants:
    """The configured tenants by their keys. None of them: whoever asks is let in, without limit."""

    def __init__(
        self, tenants: Sequence[Tenant], clock: Clock = time.monotonic, tallies: Callable[[str], Tally] | None = None
    ) -> None:
        """`tallies`: what the tenants of these names have used; without them, nothing."""
        tallies = tallies or Alone()
        self._anybody = None if tenants else Account(None, clock)
        self._accounts: list[tuple[str, Account]] = []
        for tenant in tenants:
            account = Account(tenant, clock, tallies(tenant.name))
            self._accounts += [(sha256, account) for sha256 in tenant.key_sha256]

    def account(self, headers: Headers) -> Account:
        """Whose request this is. Raises `Unauthenticated`."""
        if self._anybody is not None:
            return self._anybody
        key = offered_key(headers)
        if key is None:
            words = "no API key: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
            raise Unauthenticated(words)
        offered = digest(key)
        found = [account for sha256, account in self._accounts if hmac.compare_digest(offered, sha256)]
        if not found:
            raise Unauthenticated("the API key is not one of this gateway's")
        return found[0]


def duration(seconds: float) -> str:
    """As OpenAI writes how long a limit takes to be whole again: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 10) / 10:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def _bucket(limit: int | None, clock: Clock, tally: Tally, first: int) -> Bucket | None:
    return None if limit is None else Bucket(limit, clock, tally.cells, first)
