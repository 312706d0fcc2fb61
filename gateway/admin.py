"""What operators ask of the cache: figures, look-ups, deletions, answers put in and written out.

Where each worker has a cache of its own, which is so in memory, all of them are asked, by way of `gateway.siblings`. Of
Milvus there is one, and who uses it follows what is purged there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import orjson
from starlette.responses import Response

from gateway import limits, overrides
from gateway.cache import Cache, CacheUnavailable, Entry, Hit, Origin, Selection
from gateway.call import Call
from gateway.chat import Chat, check_model
from gateway.config import Config
from gateway.errors import ApiError, BadRequest, PartUnavailable, UnknownAnswer
from gateway.matching import Matcher, Proposal
from gateway.metrics import Metrics
from gateway.request import (
    Body,
    CacheControl,
    ChatRequest,
    check_fields,
    decode,
    owner,
    parse,
    question_key,
    scope_key,
    typed,
)
from gateway.rows import (
    FAQ,
    NOT_EMBEDDED,
    WARM_UP,
    Row,
    entry_of,
    is_digest,
    of_entry,
    pair,
    restored,
    with_embedding,
)
from gateway.siblings import Answer, Siblings
from gateway.tenants import Account, Admission
from gateway.triton import Router, TritonUnavailable

log = logging.getLogger("fingerpost")

SELECTED_BY = ("tenant", "model", "scope")
LOOKUP_FIELDS = ("request", "tenant")
ROWS = "application/x-ndjson"

_PREFIX = re.compile(r"[0-9a-f]{1,8}")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of an operator."""

    raw: bytes
    path: Mapping[str, str]  # what the path names
    query: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Client:
    """For whom answers are."""

    admission: Admission
    tenant: str  # its name, or the digest of the credential; "" when that tells nothing
    credential: str


class Admin:
    def __init__(
        self,
        config: Config,
        router: Router,
        cache: Cache | None,
        matcher: Matcher,
        chat: Chat,
        metrics: Metrics,
        siblings: Siblings | None = None,
    ) -> None:
        """`siblings`: the other workers, if there are any."""
        self._config = config
        self._settings = config.semantic_cache
        self._router = router
        self._opened = cache
        self._matcher = matcher
        self._chat = chat
        self._metrics = metrics
        self._siblings = siblings

    # The routes

    async def statistics(self, asked: Asked) -> Response:
        caches = await self._caches("count", None)
        figures = await self._workers("figures", None)
        score = self._matcher.threshold
        return _json(
            {
                "backend": self._settings.backend_type,
                "caches": len(caches),
                "entries": sum(each["entries"] for each in caches),
                "by_model": _added([each["by_model"] for each in caches]),
                "outcomes": _added(figures),
                "thresholds": {
                    "max_error_rate": self._settings.max_error_rate,
                    "score": score if math.isfinite(score) else None,
                    "similarity": self._matcher.floor,
                },
                "limits": {
                    "rows": self._config.batch.max_inputs,
                    "bytes": self._config.listen.max_body_bytes,
                },
            }
        )

    async def lookup(self, asked: Asked) -> Response:
        """What the cache would do with a chat completion."""
        body = decode(asked.raw)
        check_fields(body, LOOKUP_FIELDS, "a look-up")
        typed(body, "request", dict, "an object", required=True)
        typed(body, "tenant", str, "a string")
        own, *others = await self._caches("lookup", body)
        exact = next((each["exact"] for each in (own, *others) if each["exact"]), None)
        return _json({**own, "exact": exact, "candidates": _best(own, *others)})

    async def entry(self, asked: Asked) -> Response:
        """One of them."""
        rows = _newest(await self._caches("entry", _key(asked)))
        if not rows:
            raise UnknownAnswer("no answer of this key is in the cache", param="key")
        return _json(rows[0])

    async def delete(self, asked: Asked) -> Response:
        await self._purged(Selection(key=_key(asked)))
        return _json({"deleted": True})

    async def entries(self, asked: Asked) -> Response:
        """Those whose keys begin so."""
        prefix = asked.query.get("prefix", "")
        if not _PREFIX.fullmatch(prefix):
            raise BadRequest("prefix must be 1 to 8 hex digits, lower case", param="prefix")
        rows = _newest(await self._caches("entries", prefix))
        return Response(b"".join(orjson.dumps(row) + b"\n" for row in rows), media_type=ROWS)

    async def purge(self, asked: Asked) -> Response:
        return _json({"purged": await self._purged(parse_selection(asked.raw))})

    async def flush(self, asked: Asked) -> Response:
        return _json({"purged": await self._purged(Selection())})

    async def load(self, asked: Asked) -> Response:
        """Put answers into the cache: rows as `entries` gives them, or pairs of questions and answers."""
        lines = [(i, line) for i, line in enumerate(asked.raw.split(b"\n"), 1) if line.strip()]
        if not lines:
            raise BadRequest("the body holds no rows")
        if len(lines) > (most := self._config.batch.max_inputs):
            raise BadRequest(f"the body holds {len(lines)} rows; at most {most} are taken at once")
        taken: dict[int, Entry] = {}
        refused: dict[int, str] = {}
        for i, line in lines:
            try:
                taken[i] = self._entry(decode(line))
            except ApiError as error:
                refused[i] = error.message
        embedded = await self._embedded(taken)
        refused |= dict.fromkeys(taken.keys() - embedded.keys(), "the question is longer than the models read")
        await self._caches("load", [with_embedding(entry) for entry in embedded.values()])
        log.info("cache: %d answers were put in, %d were refused", len(embedded), len(refused))
        skipped = [{"line": i, "reason": refused[i]} for i in sorted(refused)]
        return _json({"stored": len(embedded), "skipped": skipped})

    async def _purged(self, which: Selection) -> int:
        """How many there were."""
        count = int(sum(await self._caches("purge", asdict(which))))
        log.info("cache: %d answers were deleted", count)
        return count

    # Workers, and what each is asked

    @property
    def answers(self) -> dict[str, Answer]:
        """To what other workers ask, by name."""
        return {
            "figures": self._own_figures,
            "count": self._own_count,
            "lookup": self._own_lookup,
            "entry": self._own_entry,
            "entries": self._own_entries,
            "purge": self._own_purge,
            "load": self._own_load,
        }

    async def _caches(self, name: str, given: Any) -> list[Any]:
        """What this worker answers, and those that have a cache of their own."""
        if self._settings.backend_type == "memory":
            return await self._workers(name, given)
        return [await self.answers[name](given)]

    async def _workers(self, name: str, given: Any) -> list[Any]:
        said = [await self.answers[name](given)]
        if self._siblings is not None:
            said += [each async for each in self._siblings.ask(name, given)]
        return said

    @property
    def _cache(self) -> Cache:
        if self._opened is None:
            raise PartUnavailable("the cache is not enabled")
        return self._opened

    async def _own_figures(self, given: None) -> dict[str, int]:
        """Requests for an answer by what the cache did."""
        samples = [sample for metric in self._metrics.cache.collect() for sample in metric.samples]
        return {each.labels["outcome"]: int(each.value) for each in samples if each.name.endswith("_total")}

    async def _own_count(self, given: None) -> dict[str, Any]:
        with _named():
            names = [*(model.name for model in self._config.models), FAQ]
            by_model = {name: await self._cache.count(Selection(model=name)) for name in names}
            return {"entries": await self._cache.count(Selection()), "by_model": by_model}

    async def _own_entry(self, key: str) -> list[Row]:
        with _named():
            entry = await self._found(key)
        return [] if entry is None else [of_entry(entry)]

    async def _found(self, key: str) -> Entry | None:
        """The entry, without that it counts as used."""
        entries = await self._cache.entries(key)
        if entries or self._settings.backend_type == "memory":
            return entries[0] if entries else None
        return await self._cache.get(key)  # Milvus finds what was stored just now only so

    async def _own_entries(self, prefix: str) -> list[Row]:
        with _named():
            return [of_entry(entry) for entry in await self._cache.entries(prefix)]

    async def _own_purge(self, which: dict[str, str | None]) -> int:
        selection = Selection(**which)
        with _named():
            count = await self._cache.count(selection)
            await self._cache.purge(selection)
        return count

    async def _own_load(self, rows: list[Row]) -> None:
        with _named():
            await self._cache.check()  # `put` says of nothing that it was not taken
            for row in rows:
                self._cache.put(entry_of(row))

    async def _own_lookup(self, given: Body) -> dict[str, Any]:
        call = self._call(given["request"], given.get("tenant"))
        route = await self._chat.route(call)
        call = replace(call, scope=overrides.scope(call.scope, route.overrides))
        with _named():
            exact = None if call.uncacheable else await self._found(call.key)
            near: list[Hit] = []
            if route.uncacheable is None and route.reading is not None:
                near = await self._cache.search(call.scope, route.reading.embedding, self._matcher.floor)
        return {
            "key": call.key,
            "scope": call.scope,
            "eligible": route.uncacheable is None,
            "reason": route.uncacheable,
            "exact": None if exact is None else of_entry(exact),
            "candidates": await self._candidates(call.request.question, near),
        }

    async def _candidates(self, question: str, near: list[Hit]) -> list[Row]:
        """Those that might be served."""
        if not near:
            return []
        try:
            found = await self._matcher.propose(question, near)
        except TritonUnavailable as error:
            log.warning("look-up: %s", error)
            return [_candidate(hit) for hit in near]
        best, may_be_served = self._matcher.best(found)
        return [_candidate(each, is_served=may_be_served and each is best) for each in found]

    # Reading what is given

    def _call(self, body: Body, tenant: str | None) -> Call:
        """The chat completion of this body, as if the tenant had sent it. Raises `ApiError`."""
        request, client, scope = self._read(body, tenant)
        return Call(
            id=uuid.uuid4().hex,
            request=request,
            scope=scope,
            control=CacheControl(),
            uncacheable=self._chat.cacheable(request),
            started=time.perf_counter(),
            admission=client.admission,
            tenant=client.tenant,
        )

    def _read(self, body: Body, tenant: str | None) -> tuple[ChatRequest, Client, str]:
        """A chat completion, whose it is, and its scope. Raises `ApiError`."""
        client = self._client(tenant)
        request = parse(orjson.dumps(body))
        limits.check(request.body, self._config.listen)
        check_model(self._config, request.model, client.admission)
        whose = owner(request, self._settings.scope, client.tenant, client.credential)
        return request, client, scope_key(request, whose)

    def _client(self, tenant: str | None) -> Client:
        """Raises `BadRequest` when answers are kept apart by what is not given."""
        sharing, tenants = self._settings.scope, self._config.tenants
        if sharing == "global" and tenant is None:
            return Client(Account(None).admit(counted=False), "", "")
        if not tenants:
            if tenant is None or not is_digest(tenant):
                words = (
                    "as no tenants are configured, must be the SHA-256, in hex, of the clients' Authorization header"
                )
                raise BadRequest(f"tenant, {words}", param="tenant")
            return Client(Account(None).admit(counted=False), tenant, tenant)
        if sharing == "user":
            words = (
                "semantic_cache.scope is user: answers are kept for single keys of a tenant, which are not known here"
            )
            raise BadRequest(words, param="tenant")
        found = next((each for each in tenants if each.name == tenant), None)
        if found is None:
            raise BadRequest(f"tenant must be one of {', '.join(each.name for each in tenants)}", param="tenant")
        return Client(Account(found).admit(counted=False), found.name, "")

    def _entry(self, row: Row) -> Entry:
        """Of a row, not embedded. Raises `ApiError` that says why it is not taken."""
        return restored(row, time.time()) if "scope" in row else self._of_pair(row)

    def _of_pair(self, row: Row) -> Entry:
        given, now = pair(row), time.time()
        request, client, scope = self._read(given.body, given.tenant)
        if reason := self._chat.cacheable(request):
            raise BadRequest(f"it would not be replayed: {reason}")
        policy = self._config.aliases.get(request.model)
        if policy is not None and policy.has_overrides:
            raise BadRequest(f"it would not be replayed: rules of {request.model} change what is asked", param="model")
        most = self._config.longest_ttl_seconds
        if given.ttl_seconds is not None and given.ttl_seconds > most:
            raise BadRequest(f"ttl_seconds is more than the {most} that the cache keeps answers", param="ttl_seconds")
        return Entry(
            key=question_key(scope, request.question),
            scope=scope,
            tenant=client.tenant,
            question=request.question,
            embedding=NOT_EMBEDDED,
            answer=given.answer,
            origin=Origin(FAQ, WARM_UP, None, None),
            created_at=now,
            expires_at=now + (given.ttl_seconds or self._settings.ttl_seconds),
        )

    async def _embedded(self, entries: Mapping[int, Entry]) -> dict[int, Entry]:
        """Those whose questions were read to their ends."""
        with _named():
            found = await self._router.embed([entry.question for entry in entries.values()])
        return {
            i: replace(entry, embedding=each.embedding)
            for (i, entry), each in zip(entries.items(), found, strict=True)
            if not each.truncated
        }


Ask = Callable[[Admin, Asked], Awaitable[Response]]

ROUTES: Mapping[str, Mapping[str, Ask]] = {  # path -> method -> what is asked
    "/admin/cache": {"GET": Admin.statistics},
    "/admin/cache/lookup": {"POST": Admin.lookup},
    "/admin/cache/entries": {"GET": Admin.entries, "POST": Admin.load},
    "/admin/cache/entries/{key}": {"GET": Admin.entry, "DELETE": Admin.delete},
    "/admin/cache/purge": {"POST": Admin.purge},
    "/admin/cache/flush": {"POST": Admin.flush},
}


def parse_selection(raw: bytes) -> Selection:
    """Read the body of a purge. Raises `BadRequest` naming the field."""
    body = decode(raw)
    check_fields(body, SELECTED_BY, "a purge")
    given = {name: typed(body, name, str, "a string") for name in SELECTED_BY}
    if not any(value is not None for value in given.values()):
        raise BadRequest(f"at least one of {', '.join(SELECTED_BY)} is required; /admin/cache/flush takes all")
    return Selection(**given)


def _key(asked: Asked) -> str:
    key = asked.path["key"]
    if not is_digest(key):
        raise BadRequest("key must be 64 hex digits, lower case", param="key")
    return key


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Within this, what does not answer is told to the operator."""
    try:
        yield
    except CacheUnavailable as error:
        raise PartUnavailable(f"the cache does not answer: {error}") from error
    except TritonUnavailable as error:
        raise PartUnavailable(f"Triton does not answer: {error}") from error


def _newest(caches: list[list[Row]]) -> list[Row]:
    """The rows of several caches; where more than one has answered the same question, what the last of them said."""
    found = sorted((row for rows in caches for row in rows), key=lambda row: float(row["created_at"]))
    return list({row["key"]: row for row in found}.values())


def _candidate(hit: Hit | Proposal, *, is_served: bool = False) -> Row:
    judged = isinstance(hit, Proposal)
    score = hit.score if isinstance(hit, Proposal) and math.isfinite(hit.score) else None
    return {
        "key": hit.entry.key,
        "question": hit.entry.question,
        "similarity": hit.similarity,
        "score": score,
        "probability": hit.probability if isinstance(hit, Proposal) else None,
        "served": judged and is_served,
    }


def _best(*lookups: Row) -> list[Row]:
    """The candidates of several caches, best first; one at most is served."""
    found = {each["key"]: each for lookup in lookups for each in lookup["candidates"]}
    best = sorted(found.values(), key=_rank)
    return [{**each, "served": each["served"] and i == 0} for i, each in enumerate(best)]


def _rank(candidate: Row) -> tuple[bool, float, float]:
    score = -math.inf if candidate["score"] is None else candidate["score"]
    return not candidate["served"], -score, -candidate["similarity"]


def _added(counts: list[dict[str, int]]) -> dict[str, int]:
    names = sorted(set().union(*counts))
    return {name: sum(each.get(name, 0) for each in counts) for name in names}


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
