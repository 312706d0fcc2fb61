"""What can go wrong, as a client sees it.

    ApiError
    ├── BadRequest           400  the body or a header is not what the API takes
    ├── Unauthenticated      401  no API key, or none that is known
    ├── NotAllowed           403  only for who runs the gateway
    ├── ModelNotAllowed      403  the tenant may not use this model
    ├── UnknownModel         404  neither an alias nor a configured model
    ├── UnknownAnswer        404  feedback on an answer that is not remembered; an entry that is not in the cache
    ├── BodyTooLarge         413  more bytes than listen.max_body_bytes
    ├── LimitReached         429  the tenant has had its requests or tokens for now
    ├── AnswerTooLong        502  a model's answer has more bytes than upstream.max_answer_bytes
    ├── UpstreamUnavailable  503  no endpoint of the chosen model, or of its fallbacks, gives an answer
    ├── PartUnavailable      503  Triton or the cache is down, and the request is for it alone
    └── UpstreamTimeout      504  the endpoint took the request and fell silent, or total_timeout_seconds are over

Every one is sent in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`; where the request is in
Anthropic's, so is the error: `{"type": "error", "error": {"type", "message"}, "request_id"}`. Failures of Triton and
Milvus reach no client that wants an answer of a model, see `gateway.degradation`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NOT_AGAIN = MappingProxyType({"x-should-retry": "false"})  # as OpenAI's and Anthropic's clients understand it


class ApiError(Exception):
    """An error with a status and OpenAI's fields; `param` names the offending field of the request."""

    status = 500
    type = "api_error"
    code: str | None = None
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class Unauthenticated(ApiError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class NotAllowed(ApiError):
    status = 403
    type = "invalid_request_error"
    code = "not_allowed"


class ModelNotAllowed(ApiError):
    status = 403
    type = "invalid_request_error"
    code = "model_not_allowed"


class UnknownModel(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownAnswer(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "answer_not_found"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class LimitReached(ApiError):
    """`kind`: what there is no more of, requests or tokens. `seconds`: until there is; None: there never will be."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, kind: str, seconds: float | None) -> None:
        super().__init__(message)
        self.type = kind
        self.headers = NOT_AGAIN if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


class AnswerTooLong(ApiError):
    """The request asks for so much: sent again, here or elsewhere, it would be generated once more for nothing."""

    status = 502
    code = "answer_too_long"
    headers = NOT_AGAIN


class UpstreamUnavailable(ApiError):
    """`seconds`: when an endpoint may be asked again, if one has said so."""

    status = 503
    type = "api_error"
    code = "upstream_unavailable"

    def __init__(self, message: str, *, seconds: float | None = None) -> None:
        super().__init__(message)
        if seconds is not None:
            self.headers = {"Retry-After": str(max(1, math.ceil(seconds)))}


class PartUnavailable(ApiError):
    status = 503
    type = "api_error"
    code = "part_unavailable"


class UpstreamTimeout(ApiError):
    status = 504
    type = "api_error"
    code = "upstream_timeout"


def openai_form(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


# What a client of Anthropic's knows each status by; any other is an api_error.
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def anthropic_form(status: int, message: str, request_id: str) -> dict[str, Any]:
    error = {"type": ANTHROPIC_TYPES.get(status, "api_error"), "message": message}
    return {"type": "error", "error": error, "request_id": request_id}
