"""The OpenAPI document at /openapi.json: what the gateway takes and gives; what it passes on is only named.

A schema here refuses what the gateway refuses and nothing else: a field that only vLLM reads may hold anything, because
vLLM says what it takes.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

VERSION = "0.1.0"
_PASSED_ON = (
    "Fields that are not described here are passed on to the endpoint as they are; what it answers comes back byte "
    "for byte."
)


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Json, **more: Any) -> Json:
    return {"type": "array", "items": items, **more}


def fields(required: tuple[str, ...] = (), /, **properties: Json) -> Json:
    """An object that may hold more than these."""
    return {"type": "object", "required": list(required), "properties": properties}


def closed(required: tuple[str, ...] = (), /, **properties: Json) -> Json:
    """An object that holds nothing else."""
    return {**fields(required, **properties), "additionalProperties": False}


def nullable(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


STRING: Json = {"type": "string"}
NUMBER: Json = {"type": "number"}
COUNT: Json = {"type": "integer", "minimum": 0}
FLAG: Json = {"type": "boolean"}
SHARE: Json = {"type": "number", "minimum": 0, "maximum": 1}
COUNTS: Json = {"type": "object", "additionalProperties": COUNT}
DIGEST: Json = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
TENANT: Json = {
    "type": "string",
    "description": "its name; where none are configured, the SHA-256 of the client's Authorization header, in hex",
}
SCORES: Json = {"type": "object", "additionalProperties": SHARE}
MODEL: Json = {
    "type": "string",
    "minLength": 1,
    "maxLength": 200,
    "description": "an alias such as `auto`, which is routed, or the name of a configured model, which is not",
}
TEXTS: Json = {
    "anyOf": [{"type": "string", "pattern": r"\S"}, array({"type": "string", "pattern": r"\S"}, minItems=1)],
    "description": "one text or several, at most `batch.max_inputs`; arrays of tokens are not taken",
}
STREAMING: Json = {
    "stream": nullable(FLAG),
    "stream_options": nullable(fields(include_usage=nullable(FLAG))),
}


def typed_part(kind: str | list[str]) -> Json:
    """A part of a content: if it is of this kind it has a text."""
    condition: Json = {"enum": kind} if isinstance(kind, list) else {"const": kind}
    return {
        **fields(("type",), type=STRING),
        "if": {"properties": {"type": condition}, "required": ["type"]},
        "then": {"properties": {"text": STRING}, "required": ["text"]},
    }


CONTENT: Json = {"anyOf": [STRING, array(typed_part("text"), minItems=1)]}
ITEM_CONTENT: Json = {"anyOf": [STRING, array(typed_part(["text", "input_text", "output_text"]))]}
PROMPT: Json = {
    "anyOf": [STRING, array(STRING, minItems=1), array(COUNT, minItems=1), array(array(COUNT), minItems=1)],
}

SCHEMAS: Json = {
    "Message": {
        "anyOf": [
            fields(("role", "content"), role={"const": "user"}, content=CONTENT),
            fields(("role",), role={"type": "string", "not": {"const": "user"}}, content=nullable(CONTENT)),
        ]
    },
    "ChatCompletionRequest": {
        **fields(("model", "messages"), model=MODEL, messages=array(ref("Message"), minItems=1), **STREAMING),
        "description": _PASSED_ON,
    },
    "CompletionRequest": {
        "anyOf": [
            fields(("prompt",), prompt=PROMPT),
            fields(("prompt_embeds",), prompt={"type": "null"}, prompt_embeds={"not": {"type": "null"}}),
        ],
        **fields(("model",), model=MODEL, **STREAMING),
        "description": _PASSED_ON,
    },
    "InputItem": {
        "anyOf": [
            fields(("role", "content"), type={"enum": ["message", None]}, role=STRING, content=ITEM_CONTENT),
            fields(("type",), type={"type": "string", "not": {"const": "message"}}),
        ]
    },
    "ResponseRequest": {
        **fields(
            ("model", "input"),
            model=MODEL,
            input={"anyOf": [STRING, array(ref("InputItem"), minItems=1)]},
            instructions=nullable(STRING),
            **STREAMING,
        ),
        "description": _PASSED_ON,
    },
    "MessagesRequest": {
        **fields(
            ("model", "messages"),
            model=MODEL,
            messages=array(ref("Message"), minItems=1),
            system=nullable({"anyOf": [STRING, array(typed_part(["text", "input_text", "output_text"]))]}),
            **STREAMING,
        ),
        "description": _PASSED_ON,
    },
    "Usage": fields(("prompt_tokens", "total_tokens"), prompt_tokens=COUNT, total_tokens=COUNT),
    "ChatCompletion": fields(
        ("id", "object", "created", "model", "choices"),
        id=STRING,
        object={"const": "chat.completion"},
        created=COUNT,
        model=STRING,
        choices=array(
            fields(("index", "message"), index=COUNT, message=fields(("role",), role={"const": "assistant"})),
            minItems=1,
        ),
        usage=nullable(ref("Usage")),
    ),
    "Completion": fields(
        ("id", "object", "created", "model", "choices"),
        id=STRING,
        object={"const": "text_completion"},
        created=COUNT,
        model=STRING,
        choices=array(fields(("index", "text"), index=COUNT, text=STRING), minItems=1),
        usage=nullable(ref("Usage")),
    ),
    "Response": fields(
        ("id", "object", "created_at", "model", "output", "status"),
        id=STRING,
        object={"const": "response"},
        created_at=COUNT,
        model=STRING,
        output=array(fields(("type",), type=STRING)),
        status=STRING,
    ),
    "AnthropicMessage": fields(
        ("id", "type", "role", "content", "model"),
        id=STRING,
        type={"const": "message"},
        role={"const": "assistant"},
        content=array(fields(("type",), type=STRING)),
        model=STRING,
    ),
    "EmbeddingRequest": closed(
        ("model", "input"),
        model={"const": "embedder"},
        input=TEXTS,
        encoding_format=nullable({"enum": ["float", "base64"]}),
        dimensions=nullable({"type": "integer", "description": "only the embedder's own"}),
        user=nullable(STRING),
    ),
    "Embeddings": closed(
        ("object", "data", "model", "usage"),
        object={"const": "list"},
        data=array(
            closed(
                ("object", "index", "embedding"),
                object={"const": "embedding"},
                index=COUNT,
                embedding={"anyOf": [array(NUMBER), {"type": "string", "contentEncoding": "base64"}]},
            )
        ),
        model={"const": "embedder"},
        usage=ref("Usage"),
    ),
    "ClassifyRequest": closed(("input",), input=TEXTS, model=nullable(STRING)),
    "Classifications": closed(
        ("object", "data"),
        object={"const": "list"},
        data=array(
            closed(
                ("object", "index", "category", "category_scores", "complexity", "quality", "truncated"),
                object={"const": "classification"},
                index=COUNT,
                category=STRING,
                category_scores={**SCORES, "description": "category -> probability"},
                complexity={**SHARE, "description": "probability that a small model will not do"},
                quality={**SCORES, "description": "ability -> probability that a model of this ability answers right"},
                truncated={**FLAG, "description": "the text is longer than the models read"},
            )
        ),
    ),
    "FeedbackRequest": closed(
        ("id", "good"),
        id={**STRING, "maxLength": 300, "description": "of the response, or its x-request-id"},
        good=FLAG,
        comment=nullable({**STRING, "maxLength": 4000}),
    ),
    "Feedback": closed(
        ("id", "good", "evicted", "recorded"),
        id=STRING,
        good=FLAG,
        evicted={**FLAG, "description": "the answer has left the cache"},
        recorded={**FLAG, "description": "the verdict is in data_dir/feedback.jsonl; only with feedback.record"},
    ),
    "Route": {
        **fields(
            ("model", "endpoint", "endpoints", "fallback", "rule", "reason", "overrides", "complexity", "cache"),
            model=STRING,
            endpoint={**STRING, "description": "that is asked first"},
            endpoints=array(fields(("url", "state"), url=STRING, state=STRING)),
            fallback=array({**STRING, "description": "models that answer when this one cannot"}),
            rule=STRING,
            reason={**STRING, "description": "why this model, in words"},
            overrides={"type": "object", "description": "what the rule changes in the request"},
            category=nullable(STRING),
            category_scores=nullable(SCORES),
            complexity=nullable(SHARE),
            quality=nullable(SCORES),
            truncated=nullable(FLAG),
            cache=closed(("eligible", "reason"), eligible=FLAG, reason=nullable(STRING)),
        ),
        "description": "what a chat completion with this body would do, and why",
    },
    "CacheStatistics": closed(
        ("backend", "caches", "entries", "by_model", "outcomes", "thresholds", "limits"),
        backend={"enum": ["memory", "milvus"]},
        caches={**COUNT, "description": "how many there are: in memory each worker has its own"},
        entries={**COUNT, "description": "in all of them"},
        by_model={**COUNTS, "description": "model -> entries with its answers; `faq`: those of a warm-up"},
        outcomes={**COUNTS, "description": "x-fingerpost-cache -> requests, of all workers that were asked"},
        thresholds=closed(
            ("max_error_rate", "score", "similarity"),
            max_error_rate=SHARE,
            score={**nullable(NUMBER), "description": "log-odds from which an answer is served; null: none is"},
            similarity={**NUMBER, "description": "cosine below which a question is not compared"},
        ),
        limits=closed(
            ("rows", "bytes"),
            rows={**COUNT, "description": "that may be put in with one request"},
            bytes={**COUNT, "description": "that its body may have"},
        ),
    ),
    "CacheLookupRequest": closed(
        ("request",),
        request=ref("ChatCompletionRequest"),
        tenant=nullable(TENANT),
    ),
    "CacheLookup": {
        **closed(
            ("key", "scope", "eligible", "reason", "exact", "candidates"),
            key=DIGEST,
            scope=DIGEST,
            eligible={**FLAG, "description": "whether the cache may answer"},
            reason=nullable(STRING),
            exact=nullable(ref("CacheEntry")),
            candidates=array(
                closed(
                    ("key", "question", "similarity", "score", "probability", "served"),
                    key=DIGEST,
                    question=STRING,
                    similarity={**NUMBER, "description": "cosine"},
                    score={**nullable(NUMBER), "description": "log-odds that its answer serves; null: not verified"},
                    probability=nullable(SHARE),
                    served={**FLAG, "description": "whether this answer would be, if there were no exact one"},
                )
            ),
        ),
        "description": "what the cache would do with a chat completion",
    },
    "CacheEntry": closed(
        ("key", "scope", "tenant", "question", "answer", "origin", "created_at", "expires_at"),
        key=DIGEST,
        scope=DIGEST,
        tenant={**STRING, "description": "who asked first"},
        question=STRING,
        answer=closed(
            ("model", "message", "finish_reason", "usage"),
            model=STRING,
            message={"type": "object"},
            finish_reason=STRING,
            usage=nullable({"type": "object"}),
        ),
        origin=closed(
            ("model", "rule", "category", "complexity"),
            model=STRING,
            rule=STRING,
            category=nullable(STRING),
            complexity=nullable(SHARE),
        ),
        created_at=NUMBER,
        expires_at={**NUMBER, "description": "seconds since the epoch, as created_at"},
    ),
    "CachePair": closed(
        ("question", "answer"),
        question=STRING,
        answer=STRING,
        request={
            "anyOf": [{"type": "object"}, {"type": "null"}],
            "description": "the chat completion that clients send, without the question, which is its last message; "
            'if not given, {"model": "auto"}',
        },
        tenant=nullable(TENANT),
        ttl_seconds=nullable({"type": "integer", "minimum": 1}),
    ),
    "CacheSelection": {
        **closed((), **{name: nullable(STRING) for name in ("tenant", "model", "scope")}),
        "anyOf": [fields((name,), **{name: STRING}) for name in ("tenant", "model", "scope")],
        "description": "entries for which all that is given is so",
    },
    "CacheLoaded": closed(
        ("stored", "skipped"),
        stored=COUNT,
        skipped=array(closed(("line", "reason"), line={"type": "integer", "minimum": 1}, reason=STRING)),
    ),
    "CachePurged": closed(("purged",), purged={**COUNT, "description": "entries that there were, about"}),
    "CacheDeleted": closed(("deleted",), deleted={"const": True}),
    "Model": fields(
        ("id", "object", "created", "owned_by"), id=STRING, object={"const": "model"}, created=COUNT, owned_by=STRING
    ),
    "Models": closed(("object", "data"), object={"const": "list"}, data=array(ref("Model"))),
    "Health": closed(("status",), status={"const": "ok"}),
    "Readiness": closed(
        ("status", "not_ready"),
        status={"enum": ["ready", "not ready", "draining"]},
        not_ready={"type": "object", "additionalProperties": STRING, "description": "part -> what is wrong with it"},
    ),
    "Error": closed(
        ("error",),
        error=closed(
            ("message", "type", "param", "code"),
            message=STRING,
            type=STRING,
            param=nullable(STRING),
            code=nullable(STRING),
        ),
    ),
    "AnthropicError": closed(
        ("type", "error", "request_id"),
        type={"const": "error"},
        error=closed(("type", "message"), type=STRING, message=STRING),
        request_id=STRING,
    ),
}

REASONS = {
    "400": "the body or a header is not what the API takes; `param` names the field",
    "401": "no API key, or none that is known",
    "403": "the tenant may not do this",
    "404": "the model, or the answer, is not known",
    "408": "the request did not come in time",
    "413": "more bytes than `listen.max_body_bytes`",
    "429": "the tenant has had its requests or tokens for now; Retry-After says when to ask again",
    "431": "more headers than `listen` allows",
    "502": "the answer is longer than `upstream.max_answer_bytes`",
    "503": "what the request needs cannot be reached",
    "504": "the model's endpoint took the request and fell silent",
}
_LATE = "408 431"
_REFUSED = f"400 401 403 413 429 503 {_LATE}"
HEADERS: Json = {
    "x-request-id": {"schema": STRING},
    "x-fingerpost-cache": {"schema": {"enum": ["hit-exact", "hit-semantic", "joined", "miss", "bypass"]}},
    "x-fingerpost-cache-reason": {"schema": STRING, "description": "why the cache had no say"},
    "x-fingerpost-model": {"schema": STRING, "description": "that answered"},
    "x-fingerpost-fallback-for": {"schema": STRING, "description": "the model that was chosen and could not"},
    "x-fingerpost-rule": {"schema": STRING},
    "x-fingerpost-category": {"schema": STRING},
    "x-fingerpost-complexity": {"schema": STRING},
    "x-fingerpost-similarity": {"schema": STRING, "description": "cosine, of a hit by meaning"},
    "x-fingerpost-confidence": {"schema": STRING, "description": "that the answer serves, of a hit by meaning"},
    "x-fingerpost-upstream-tokens": {"schema": {"const": "0"}, "description": "a hit: no model generated anything"},
}
DIRECTIVE = "(no-cache|no-store|ttl=[0-9]{1,9})"
PARAMETERS: Json = {
    "cache_control": {
        "name": "x-fingerpost-cache-control",
        "in": "header",
        "schema": {"type": "string", "pattern": f"^ *({DIRECTIVE} *)?(, *({DIRECTIVE} *)?)*$"},
        "description": "no-cache: do not replay, store the answer; no-store: do not store; ttl=seconds: how long",
    },
    "request_id": {
        "name": "x-request-id",
        "in": "header",
        "schema": STRING,
        "description": "comes back, goes to the log and upstream; one that is not safe to log is replaced",
    },
}


def json_content(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def errors(statuses: str, schema: Json) -> Json:
    return {status: {"description": REASONS[status], "content": json_content(schema)} for status in statuses.split()}


def post(summary: str, request: str, answer: str, statuses: str, *, operation: str) -> Json:
    return {
        "post": {
            "summary": summary,
            "operationId": operation,
            "parameters": [{"$ref": "#/components/parameters/request_id"}],
            "requestBody": {"required": True, "content": json_content(ref(request))},
            "responses": {
                "200": {"description": "the answer", "content": json_content(ref(answer))},
                **errors(statuses, ref("Error")),
            },
        }
    }


def generation(summary: str, request: str, answer: str, *, operation: str, error: str = "Error") -> Json:
    """An operation that a model answers, as JSON or as a stream, or refuses in its endpoint's own words."""
    described = post(summary, request, answer, "", operation=operation)["post"]
    content = {**json_content(ref(answer)), "text/event-stream": {}}  # what a schema is of, an event or all, is open
    theirs: Json = {"type": "object", "description": "what the model's endpoint said"}
    return {
        "post": {
            **described,
            "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in PARAMETERS],
            "responses": {
                "200": {"description": "the answer", "headers": HEADERS, "content": content},
                **errors(f"{_REFUSED} 404 502 504", {"anyOf": [ref(error), theirs]}),
                "default": {"description": "what the model's endpoint answered, as it answered it"},
            },
        }
    }


def get(summary: str, answer: Json, statuses: str, **more: Any) -> Json:
    return {
        "get": {
            "summary": summary,
            "operationId": more.pop("operation"),
            "responses": {
                "200": {"description": "the answer", "content": more.pop("content", json_content(answer))},
                **more.pop("responses", {}),
                **errors(f"{statuses} {_LATE}", ref("Error")),
            },
            **more,
        }
    }


def administration(summary: str, answer: Json, statuses: str, *, operation: str, **more: Any) -> Json:
    """An operation of those who run the gateway."""
    return {
        "summary": summary,
        "operationId": operation,
        "responses": {
            "200": {"description": "the answer", "content": more.pop("content", json_content(answer))},
            **errors(f"{statuses} 401 403 503 {_LATE}", ref("Error")),
        },
        **more,
    }


def body_of(content: Json) -> Json:
    return {"required": True, "content": content}


_ROWS = "application/x-ndjson"
_KEY = {"name": "key", "in": "path", "required": True, "schema": DIGEST}
_PREFIX = {
    "name": "prefix",
    "in": "query",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9a-f]{1,8}$"},
    "description": "that the keys begin with",
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
PATHS: Json = {
    "/v1/chat/completions": generation(
        "A chat completion, as OpenAI's", "ChatCompletionRequest", "ChatCompletion", operation="chat"
    ),
    "/v1/completions": generation(
        "A completion of a prompt, as OpenAI's, where the endpoint serves it",
        "CompletionRequest",
        "Completion",
        operation="complete",
    ),
    "/v1/responses": generation(
        "A response, as OpenAI's, where the endpoint serves it", "ResponseRequest", "Response", operation="respond"
    ),
    "/v1/messages": generation(
        "A message, as Anthropic's, where the endpoint serves it",
        "MessagesRequest",
        "AnthropicMessage",
        operation="message",
        error="AnthropicError",
    ),
    "/v1/route": post(
        "What a chat completion with this body would do; asks no LLM",
        "ChatCompletionRequest",
        "Route",
        f"{_REFUSED} 404",
        operation="route",
    ),
    "/v1/embeddings": post(
        "Embeddings, by the cache's embedder", "EmbeddingRequest", "Embeddings", f"{_REFUSED} 404", operation="embed"
    ),
    "/v1/classify": post(
        "What the classifier reads in texts", "ClassifyRequest", "Classifications", _REFUSED, operation="classify"
    ),
    "/v1/feedback": post(
        "Whether an answer was good; a bad one leaves the cache",
        "FeedbackRequest",
        "Feedback",
        f"{_REFUSED} 404",
        operation="feedback",
    ),
    "/v1/models": get("The models that may be asked for", ref("Models"), "401", operation="models"),
    "/v1/models/{name}": get("One of them", ref("Model"), "401 403 404", operation="model", parameters=[_NAME]),
    "/openapi.json": get("This document", {"type": "object"}, "", operation="openapi", security=[]),
    "/health": get("Whether this process answers", ref("Health"), "", operation="health", security=[]),
    "/ready": get(
        "Whether Triton, the cache and the endpoints answer",
        ref("Readiness"),
        "401 403",
        operation="ready",
        responses={"503": {"description": "something does not", "content": json_content(ref("Readiness"))}},
    ),
    "/metrics": get(
        "Figures for Prometheus",
        STRING,
        "401 403",
        operation="metrics",
        content={"text/plain": {"schema": STRING}},
    ),
    "/admin/cache": {
        "get": administration("What is in the cache", ref("CacheStatistics"), "", operation="cache_statistics"),
    },
    "/admin/cache/lookup": {
        "post": administration(
            "What the cache would do with a chat completion; asks no LLM and changes nothing",
            ref("CacheLookup"),
            "400 404 413",
            operation="cache_lookup",
            requestBody=body_of(json_content(ref("CacheLookupRequest"))),
        ),
    },
    "/admin/cache/entries": {
        "get": administration(
            "Entries, each a line of JSON: a `CacheEntry`",
            STRING,
            "400",
            operation="cache_entries",
            parameters=[_PREFIX],
            content={_ROWS: {"schema": STRING}},
        ),
        "post": administration(
            "Put answers into the cache: lines of JSON, each a `CacheEntry` or a `CachePair`",
            ref("CacheLoaded"),
            "400 413",
            operation="cache_load",
            requestBody=body_of({_ROWS: {"schema": STRING}}),
        ),
    },
    "/admin/cache/entries/{key}": {
        "get": administration("One entry", ref("CacheEntry"), "400 404", operation="cache_entry", parameters=[_KEY]),
        "delete": administration(
            "Delete it, if it is there", ref("CacheDeleted"), "400", operation="cache_delete", parameters=[_KEY]
        ),
    },
    "/admin/cache/purge": {
        "post": administration(
            "Delete entries by tenant, model or scope",
            ref("CachePurged"),
            "400 413",
            operation="cache_purge",
            requestBody=body_of(json_content(ref("CacheSelection"))),
        ),
    },
    "/admin/cache/flush": {
        "post": administration("Delete all entries", ref("CachePurged"), "400 413", operation="cache_flush"),
    },
}
DOCUMENT: Json = {
    "openapi": "3.1.0",
    "info": {
        "title": "Fingerpost",
        "version": VERSION,
        "description": "One OpenAI-compatible address in front of many models: a cache and a prompt router for vLLM.",
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    },
    "servers": [{"url": "/"}],
    "security": [{}, {"bearer": []}, {"x_api_key": []}],
    "paths": PATHS,
    "components": {
        "schemas": SCHEMAS,
        "parameters": PARAMETERS,
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    },
}
