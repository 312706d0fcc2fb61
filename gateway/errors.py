"""What can go wrong, as a client sees it.

    ApiError
    ├── BadRequest           400  the body or a header is not what the API takes
    ├── UnknownModel         404  neither an alias nor a configured model
    ├── BodyTooLarge         413  more bytes than listen.max_body_bytes
    ├── UpstreamUnavailable  503  no endpoint of the chosen model can be reached, or it broke off
    └── UpstreamTimeout      504  the endpoint took the request and fell silent

Every one is sent in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`. Failures of Triton and Milvus are
not here: they never reach a client, see `gateway.degradation`.
"""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error with a status and OpenAI's fields; `param` names the offending field of the request."""

    status = 500
    type = "api_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class UnknownModel(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UpstreamUnavailable(ApiError):
    status = 503
    type = "api_error"
    code = "upstream_unavailable"


class UpstreamTimeout(ApiError):
    status = 504
    type = "api_error"
    code = "upstream_timeout"


def openai_form(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}
