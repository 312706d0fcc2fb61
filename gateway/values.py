"""The kinds of single values that a configuration holds, each refusing what cannot be meant."""

from __future__ import annotations

import hashlib
import re
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr


def _not_a_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _address(value: object) -> object:
    """host:port"""
    match = re.fullmatch(r"\[?[\w.:-]+\]?:(\d{1,5})", value) if isinstance(value, str) else None
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise ValueError("must be host:port")
    return value


def _url(value: object) -> object:
    """The address of a server, without credentials: they would end in logs and metrics."""
    if not isinstance(value, str) or not re.fullmatch(r"https?://[^\s?#]+", value):
        raise ValueError("must be an http:// or https:// address, such as http://127.0.0.1:8000")
    try:
        parts = urlsplit(value)
        usable = bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be an address with a host and, if any, a port from 1 to 65535")
    if "@" in parts.netloc:
        raise ValueError("must not hold credentials")
    return value.rstrip("/")


def endpoint_url(value: object) -> str:
    """The address of a vLLM server."""
    url = str(_url(value))
    if url.endswith("/v1"):
        raise ValueError("leave out /v1, the gateway adds it")
    return url


def _milvus_uri(value: object) -> object:
    if isinstance(value, str) and "://" in value:
        return _url(value)
    if isinstance(value, str) and value.endswith(".db") and "@" not in value:
        return value
    raise ValueError("must be an http:// or https:// address, or a file that ends in .db")


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, of no use to any other."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _header(secret: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", secret.get_secret_value()):
        raise ValueError("must be printable ASCII without spaces, and not empty")
    return secret


_OF_NO_KEY = hashlib.sha256(b"").hexdigest()


def _key_digest(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("must be the 64 hex digits that `python -m gateway key` prints")
    if value == _OF_NO_KEY:
        raise ValueError("is the digest of an empty key")
    return value


Number = BeforeValidator(_not_a_boolean)
Port = Annotated[int, Number, Field(ge=1, le=65535)]
Positive = Annotated[int, Number, Field(ge=1)]
Real = Annotated[float, Number, Field(allow_inf_nan=False)]
Amount = Annotated[float, Number, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Number, Field(gt=0, allow_inf_nan=False)]
Unit = Annotated[float, Number, Field(ge=0, le=1)]
Whole = Annotated[int, Number]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]
Address = Annotated[str, BeforeValidator(_address)]
EndpointUrl = Annotated[str, BeforeValidator(endpoint_url)]
MilvusUri = Annotated[str, BeforeValidator(_milvus_uri)]
HeaderSecret = Annotated[SecretStr, AfterValidator(_header)]
KeyDigest = Annotated[str, BeforeValidator(_key_digest)]
