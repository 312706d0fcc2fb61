"""What the cache keeps in Milvus: entries as rows, and the collection they are in; no I/O.

An answer longer than a field of Milvus is compressed, and what is still longer is cut into parts, each in a row of its
own beside the entry's. A row whose scope is empty is no entry: it is a part, whose question is the entry's scope, or
the mark of a purge, which has expired since ever.
"""

from __future__ import annotations

import base64
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from pymilvus import DataType, MilvusClient
from pymilvus.milvus_client import IndexParams
from pymilvus.orm.schema import CollectionSchema

from gateway.answer import Answer
from gateway.cache import Entry, Origin, Selection
from gateway.config import RESERVED_FIELDS, Collection, Milvus, MilvusTls

FORM = 2  # of what is stored; another form is another collection
TTL_PROPERTY = "collection.ttl.seconds"
VARCHAR_BYTES = 65_535  # Milvus' limit
PART_BYTES = VARCHAR_BYTES - 64
MAX_PARTS = 64
KEY_BYTES = 80  # a digest, and the number of a part
TENANT_BYTES = 512

Row = dict[str, Any]


class SchemaMismatch(Exception):
    """The collection exists with other fields than this cache writes."""


class Unreadable(Exception):
    """A row is not of the form that this cache writes."""


@dataclass(frozen=True, slots=True)
class Purge:
    """Entries that were there at a time are to be forgotten by all."""

    which: Selection
    at: int  # milliseconds since the epoch

    def __contains__(self, entry: Entry) -> bool:
        return milliseconds(entry.created_at) <= self.at and entry in self.which

    @property
    def filter(self) -> str:
        """Of these entries' rows and of those of their parts."""
        which, wanted = self.which, ["expires_at > 0", f"created_at <= {self.at}"]
        wanted += [f"tenant == {quoted(which.tenant)}"] if which.tenant is not None else []
        wanted += [f"model == {quoted(which.model)}"] if which.model is not None else []
        if which.scope is not None:
            wanted.append(f'(scope == {quoted(which.scope)} or (scope == "" and question == {quoted(which.scope)}))')
        if which.key is not None:
            wanted.append(f"(key == {quoted(which.key)} or key like {quoted(f'{which.key}.%')})")
        return " and ".join(wanted)


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def quoted(text: str) -> str:
    """As a string in one of Milvus' filters."""
    return orjson.dumps(text).decode()


def live(now: float) -> str:
    """The filter of what has not expired."""
    return f'scope != "" and expires_at > {int(now)}'


class Rows:
    """Entries and marks as rows of a collection whose vectors are in `vector_field`."""

    def __init__(self, vector_field: str, dimension: int) -> None:
        self._vector = vector_field
        self.fields = [*RESERVED_FIELDS, vector_field]
        # A vector to search with when only the searching matters, and of rows that no search is to find.
        self.nowhere = np.full(dimension, dimension**-0.5, dtype=np.float32)

    def of_entry(self, entry: Entry) -> list[Row] | None:
        """The entry's row, then those of the parts of its answer; None when they would be too many."""
        content = orjson.dumps({"answer": entry.answer, "origin": entry.origin}).decode()
        if len(entry.question.encode()) > VARCHAR_BYTES or len(entry.tenant.encode()) > TENANT_BYTES:
            return None
        parts: list[str] = []
        if len(content.encode()) > VARCHAR_BYTES:
            packed = base64.b64encode(zlib.compress(content.encode())).decode()
            parts = [packed[i : i + PART_BYTES] for i in range(0, len(packed), PART_BYTES)]
            writing = uuid.uuid4().hex  # so that parts of two writings are never put together
            content = orjson.dumps({"parts": len(parts), "writing": writing}).decode()
            parts = [f"{writing}:{part}" for part in parts]
        if len(parts) > MAX_PARTS:
            return None
        row = {
            "key": entry.key,
            "scope": entry.scope,
            "tenant": entry.tenant,
            "model": entry.origin.model,
            "question": entry.question,
            "answer": content,
            "created_at": milliseconds(entry.created_at),
            "expires_at": int(entry.expires_at),
            self._vector: entry.embedding.tolist(),
        }
        beside = {"scope": "", "question": entry.scope, self._vector: self.nowhere.tolist()}
        more = zip(part_keys(entry.key, len(parts)), parts, strict=True)
        return [row, *({**row, **beside, "key": key, "answer": part} for key, part in more)]

    def of_purge(self, purge: Purge) -> Row:
        """A mark: it has expired since ever, and tells when it was made."""
        return {
            "key": f"purge-{uuid.uuid4().hex}",
            "scope": "",
            "tenant": "",
            "model": "",
            "question": "",
            "answer": orjson.dumps(purge.which).decode(),
            "created_at": purge.at,
            "expires_at": -(purge.at // 1000),
            self._vector: self.nowhere.tolist(),
        }

    def entry(self, row: Row, parts: Sequence[Row] = ()) -> Entry:
        """The entry in a row, and in those of its parts. Raises `Unreadable`."""
        try:
            content = orjson.loads(row["answer"])
            if "parts" in content:
                content = _joined(content, row["key"], parts)
            return Entry(
                key=row["key"],
                scope=row["scope"],
                tenant=row["tenant"],
                question=row["question"],
                embedding=np.asarray(row[self._vector], dtype=np.float32),
                answer=Answer(**content["answer"]),
                origin=Origin(**content["origin"]),
                created_at=row["created_at"] / 1000,
                expires_at=row["expires_at"],
            )
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise Unreadable(type(error).__name__) from error


def part_keys(key: str, parts: int) -> list[str]:
    return [f"{key}.{i}" for i in range(parts)]


def parts_of(row: Row) -> list[str]:
    """The keys of the rows that the answer in this one is continued in."""
    if not str(row["answer"]).startswith('{"parts":'):
        return []
    return part_keys(row["key"], min(orjson.loads(row["answer"])["parts"], MAX_PARTS))


def _joined(content: Row, key: str, parts: Sequence[Row]) -> Any:
    by_key = {part["key"]: part["answer"] for part in parts}
    pieces = [by_key[name].partition(":") for name in part_keys(key, content["parts"])]
    if {writing for writing, _, _ in pieces} != {content["writing"]}:
        raise ValueError("the parts are of another answer")
    packed = "".join(piece for _, _, piece in pieces)
    return orjson.loads(zlib.decompress(base64.b64decode(packed)))


def purge_of(mark: Row) -> Purge:
    """What a mark says. Raises `Unreadable`."""
    try:
        return Purge(Selection(**orjson.loads(mark["answer"])), mark["created_at"])
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(type(error).__name__) from error


def schema(wanted: Collection, dimension: int) -> tuple[CollectionSchema, IndexParams]:
    """The fields of the collection, and its index."""
    fields = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=wanted.description)
    fields.add_field("key", DataType.VARCHAR, is_primary=True, max_length=KEY_BYTES)
    fields.add_field("scope", DataType.VARCHAR, max_length=64, is_partition_key=wanted.partitions is not None)
    fields.add_field("tenant", DataType.VARCHAR, max_length=TENANT_BYTES)
    fields.add_field("model", DataType.VARCHAR, max_length=TENANT_BYTES)
    fields.add_field("question", DataType.VARCHAR, max_length=VARCHAR_BYTES)
    fields.add_field("answer", DataType.VARCHAR, max_length=VARCHAR_BYTES)
    fields.add_field("created_at", DataType.INT64)
    fields.add_field("expires_at", DataType.INT64)
    fields.add_field(wanted.vector_field.name, DataType.FLOAT_VECTOR, dim=dimension)
    index = MilvusClient.prepare_index_params()
    index.add_index(
        wanted.vector_field.name,
        index_type=wanted.index.type,
        metric_type=wanted.vector_field.metric_type,
        params=wanted.index.params,
    )
    return fields, index


def check_schema(description: dict[str, Any], vector_field: str, dimension: int) -> None:
    """Raises `SchemaMismatch` when a collection is not one this cache can use."""
    fields = {field["name"]: field for field in description["fields"]}
    if missing := {*RESERVED_FIELDS, vector_field} - fields.keys():
        raise SchemaMismatch(f"collection {description['collection_name']} lacks {', '.join(sorted(missing))}")
    if (found := int(fields[vector_field]["params"]["dim"])) != dimension:
        raise SchemaMismatch(f"collection {description['collection_name']} has dimension {found}, not {dimension}")


def connection_arguments(settings: Milvus) -> dict[str, Any]:
    """The `connection` section as pymilvus takes it."""
    connection = settings.connection
    if connection.is_file:
        Path(connection.address).parent.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {"uri": connection.address, "timeout": connection.timeout, "dedicated": True}
    arguments["grpc_options"] = {"grpc.max_reconnect_backoff_ms": 1000}  # gRPC's own limit is two minutes
    if not connection.is_file:
        arguments["db_name"] = connection.database
    if connection.auth.enabled:
        arguments["user"] = connection.auth.username
        arguments["password"] = connection.auth.password.get_secret_value()
    if connection.tls.enabled:
        arguments |= {"secure": True, **_certificates(connection.tls)}
    return arguments


def _certificates(tls: MilvusTls) -> dict[str, str]:
    if tls.cert_file:  # the server wants to know the client, too
        return {"ca_pem_path": tls.ca_file, "client_pem_path": tls.cert_file, "client_key_path": tls.key_file}
    return {"server_pem_path": tls.ca_file} if tls.ca_file else {}
