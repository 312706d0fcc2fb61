"""Requests that schemathesis makes from /openapi.json, valid and not: no answer that the document does not tell of."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from gateway.openapi import DOCUMENT
from tests.conftest import Server, StartGateway, Tree, before_stubs

schemathesis = pytest.importorskip("schemathesis", reason="comes with the test extra")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


schemathesis.serializer.alias("application/x-ndjson", "text/plain")
schema = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def gateway(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(before_stubs(stub.url, stub_triton))


@schema.parametrize()
@settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_of_those_described(gateway: Server, case: Any) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and case.path != "/v1/embeddings":
        case.body["model"] = "auto"  # any other name is unknown, and no more is seen of the body
    case.call_and_validate(base_url=gateway.url, checks=CHECKS, timeout=60)
