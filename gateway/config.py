"""Configuration: one frozen tree, read once from YAML, every key checked.

`load` reads the file, replaces `${NAME}` and `${NAME:-default}` in values by environment variables, validates, and
follows `semantic_cache.backend_config_path`. Whatever is wrong is a `ConfigError` whose lines each name file, key and
value. What depends on the trained weights (categories, dimension, abilities) is checked by `check_against`, once the
manifests have been read.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, SecretStr, model_validator

from gateway import certificates
from gateway.checked import ConfigError as ConfigError
from gateway.checked import Section, line, read, validate
from gateway.regex import Regex
from gateway.request import BYTES_PER_TOKEN
from gateway.values import (
    Address,
    Amount,
    EndpointUrl,
    HeaderSecret,
    KeyDigest,
    MilvusUri,
    Name,
    Number,
    Port,
    Positive,
    Real,
    Seconds,
    Unit,
    Whole,
    endpoint_url,
    is_loopback,
)

AUTO = "auto"
EMBEDDER = "embedder"  # what /v1/embeddings is asked for
DEFAULT_RULE = "default"  # none of the rules held
NAMED_RULE = "named"  # the client asked for a model by its name
BUILT_IN_RULES = (DEFAULT_RULE, NAMED_RULE)
RESERVED_FIELDS = (  # of the collection, beside the vector
    "key",
    "scope",
    "tenant",
    "model",
    "question",
    "answer",
    "created_at",
    "expires_at",
)

IndexType = Literal[
    "HNSW", "FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "SCANN", "DISKANN", "AUTOINDEX", "GPU_IVF_FLAT", "GPU_CAGRA"
]


class ServerTls(Section):
    """What the gateway shows its clients."""

    cert_file: Path
    key_file: Path

    @model_validator(mode="after")
    def _usable(self) -> Self:
        certificates.server(self.cert_file, self.key_file)
        return self


class ClientTls(Section):
    """`ca_file` checks the server (without it, the system's do); `cert_file` and `key_file` show who the client is."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @model_validator(mode="after")
    def _usable(self) -> Self:
        self.context()
        return self

    def context(self) -> ssl.SSLContext:
        return certificates.client(self.ca_file, self.cert_file, self.key_file)


class Listen(Section):
    """Where the gateway listens, to whom, and how much of a request it takes."""

    host: str = "127.0.0.1"
    port: Port = 8801
    tls: ServerTls | None = None
    allow_anonymous: bool = False
    admin_key_sha256: KeyDigest | None = None
    max_body_bytes: Positive = 4 * 1024 * 1024
    max_header_bytes: Positive = 32 * 1024
    max_headers: Positive = 100
    max_messages: Positive = 2048
    max_nesting: Annotated[int, Number, Field(ge=1, le=250)] = 100
    body_timeout_seconds: Seconds = 30.0
    write_timeout_seconds: Seconds = 60.0
    drain_seconds: Amount = 30.0
    workers: Annotated[int, Number, Field(ge=1, le=256)] = 1

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host == "localhost" or is_loopback(self.host)


class Tenant(Section):
    """Whose requests carry one of these keys. What is not given is not limited."""

    name: Name
    key_sha256: Annotated[tuple[KeyDigest, ...], Field(min_length=1)]
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrent_requests: Positive | None = None


class Triton(Section):
    address: Address = "127.0.0.1:8001"
    timeout_seconds: Seconds = 2.0
    tls: ClientTls | None = None
    model_repository: Path = Path("model_repository")


class Price(Section):
    """Price of a million tokens, in whatever currency the operator counts."""

    input: Amount
    output: Amount


class Endpoint(Section):
    """A server of a model; one of weight 2 gets twice the requests of one of weight 1."""

    url: EndpointUrl
    weight: Annotated[float, Number, Field(gt=0, le=1000)] = 1.0


def _endpoint(value: object) -> object:
    """An address alone is an endpoint of the default weight."""
    return value if isinstance(value, dict | Endpoint) else {"url": endpoint_url(value)}


class Model(Section):
    """A model behind the gateway. `name` is what its endpoints serve it as; `fallback` answers when none does."""

    name: Name
    endpoints: Annotated[tuple[Annotated[Endpoint, BeforeValidator(_endpoint)], ...], Field(min_length=1)]
    fallback: tuple[str, ...] = ()
    api_key: HeaderSecret | None = None
    price_per_million_tokens: Price
    context_window: Positive
    size: Literal["small", "medium", "large"]
    ability: str | None = None

    @property
    def ability_name(self) -> str:
        """What its ability is called in the classifier's manifest, if it is there."""
        return self.name if self.ability is None else self.ability


class HealthCheck(Section):
    enabled: bool = True
    interval_seconds: Seconds = 5.0
    timeout_seconds: Seconds = 2.0
    path: Annotated[str, Field(pattern=r"^/[\x21-\x7e]*$", max_length=200)] = "/health"


class Ejection(Section):
    """An endpoint that fails `consecutive_failures` times in a row gets nothing for `seconds`, and then one request."""

    consecutive_failures: Positive = 5
    seconds: Seconds = 10.0
    max_share: Unit = 0.5


class Upstream(Section):
    connect_timeout_seconds: Seconds = 5.0
    first_byte_timeout_seconds: Seconds = 120.0
    idle_timeout_seconds: Seconds = 300.0
    total_timeout_seconds: Seconds = 1800.0
    retries: Annotated[int, Number, Field(ge=0, le=100)] = 2
    retry_statuses: tuple[Annotated[int, Number, Field(ge=500, le=599)], ...] = (502, 503, 504)
    timeout_retry_share: Unit = 0.2
    max_wait_seconds: Amount = 5.0
    max_answer_bytes: Positive = 64 * 1024 * 1024
    health_check: HealthCheck = HealthCheck()
    ejection: Ejection = Ejection()
    tls: ClientTls | None = None


class Range(Section):
    """A half-open interval: at_least <= x < below."""

    at_least: Real | None = None
    below: Real | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.at_least is None and self.below is None:
            raise ValueError("needs at_least, below or both")
        if self.at_least is not None and self.below is not None and self.at_least >= self.below:
            raise ValueError("at_least must be less than below")
        return self

    def __contains__(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.below is None or value < self.below)


def _probable(given: Range) -> Range:
    if any(end is not None and not 0 <= end <= 1 for end in (given.at_least, given.below)):
        raise ValueError("must lie within 0 and 1")
    return given


MOST_NESTED = 16  # conditions in each other


class Condition(Section):
    """All that is given must hold; of each list, one. What `all`, `any` and `not` hold are conditions again."""

    category: tuple[str, ...] = ()
    min_confidence: Unit | None = None
    complexity: Annotated[Range, AfterValidator(_probable)] | None = None
    prompt_tokens: Range | None = None
    keywords: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    regex: tuple[Regex, ...] = ()
    tenant: tuple[str, ...] = ()
    alias: tuple[str, ...] = ()
    has_tools: bool | None = None
    has_images: bool | None = None
    all: tuple[Condition, ...] = ()
    any: tuple[Condition, ...] = ()
    negated: Annotated[Condition | None, Field(alias="not")] = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        given = {key for key, value in self if value not in (None, ())}
        if not given:
            names = (field.alias or name for name, field in type(self).model_fields.items())
            raise ValueError(f"needs at least one of {', '.join(names)}")
        if self.min_confidence is not None and not self.category:
            raise ValueError("min_confidence goes with category")
        if self._depth > MOST_NESTED:
            raise ValueError(f"conditions are nested more than {MOST_NESTED} deep")
        return self

    @property
    def _depth(self) -> int:
        inner = (*self.all, *self.any, *((self.negated,) if self.negated else ()))
        return 1 + max((condition._depth for condition in inner), default=0)

    def parts(self, key: str) -> Iterator[tuple[str, Condition]]:
        """Itself, which stands under `key`, and all the conditions in it, each with its own key."""
        yield key, self
        for name, conditions in (("all", self.all), ("any", self.any)):
            for i, condition in enumerate(conditions):
                yield from condition.parts(f"{key}.{name}[{i}]")
        if self.negated is not None:
            yield from self.negated.parts(f"{key}.not")


ALWAYS = Condition.model_construct()  # what a rule without `when` means; a file cannot say it


class Share(Section):
    """The hardest prompts go to `model`, as many as make up `at_most` this share of what the policy decides."""

    model: str
    at_most: Annotated[float, Number, Field(gt=0, lt=1)]
    half_life: Annotated[int, Number, Field(ge=100, le=1_000_000)] = 1000


class SystemPrompt(Section):
    """A text before the client's own system prompt, or instead of it."""

    prepend: Annotated[str, Field(min_length=1)] | None = None
    replace: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prepend is None) == (self.replace is None):
            raise ValueError("needs one of prepend, replace")
        return self


def _as_json(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        same = orjson.loads(orjson.dumps(value)) == value
    except (orjson.JSONEncodeError, RecursionError):
        same = False
    if not same:
        raise ValueError("must be what JSON can say")
    return value


class Overrides(Section):
    """What a rule changes in the requests that it decides."""

    system_prompt: SystemPrompt | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: Annotated[dict[str, JsonValue], AfterValidator(_as_json)] = Field(default_factory=dict)
    max_tokens: Positive | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """Those that are given."""
        given = {name: getattr(self, name) for name in Overrides.model_fields}
        if self.system_prompt is not None:
            given["system_prompt"] = self.system_prompt.model_dump(exclude_none=True)
        return {name: value for name, value in given.items() if value not in (None, {})}

    @property
    def added_tokens(self) -> int:
        """By the system prompt, estimated."""
        prompt = self.system_prompt
        return len((prompt.prepend or prompt.replace or "").encode()) // BYTES_PER_TOKEN if prompt else 0


class Rule(Overrides):
    """When it holds, `model`, or the cheapest of nearly the best predicted quality, or `share.model` answers."""

    name: Name
    when: Condition = ALWAYS
    model: str | None = None
    cheapest_within: Unit | None = None
    among: tuple[str, ...] = ()
    share: Share | None = None
    cache_ttl_seconds: Annotated[int, Number, Field(ge=0)] | None = None  # 0: what it decides is not stored


class Policy(Section):
    """Ordered rules, the first that holds decides; `default` when none does."""

    rules: tuple[Rule, ...] = ()
    default: str

    @property
    def has_overrides(self) -> bool:
        return any(rule.changes for rule in self.rules)


class Online(Section):
    """Of hits, `check_share` is also sent to the model, and what the answers say is compared. 0: none."""

    check_share: Unit = 0.0
    judge: str | None = None  # a model that is asked whether two answers say the same; without one, their embeddings
    answer_similarity: Unit = 0.9  # cosine from which two answers say the same, where there is no judge
    concurrent_checks: Positive = 4


class SemanticCache(Section):
    enabled: bool = True
    backend_type: Literal["memory", "milvus"] = "memory"
    backend_config_path: Path | None = None
    scope: Literal["tenant", "user", "global"] = "tenant"
    max_error_rate: Annotated[float, Number, Field(gt=0, le=0.5)] = 0.01
    similarity_threshold: Unit | None = None
    online: Online = Online()
    max_entries: Positive = 1000
    ttl_seconds: Positive = 3600
    eviction_policy: Literal["fifo", "lru", "lfu"] = "fifo"
    max_temperature: Amount = 1.0
    bypass_time_dependent: bool = True
    store_tool_calls: bool = False


class Feedback(Section):
    """Whether verdicts on answers are kept, with the prompts they are about, as rows for training."""

    record: bool = False
    max_bytes: Positive = 256 * 1024 * 1024


class Batch(Section):
    """How much one request to /v1/embeddings or /v1/classify may hold."""

    max_inputs: Annotated[int, Number, Field(ge=1, le=2048)] = 256


class MilvusAuth(Section):
    enabled: bool = False
    username: str = ""
    password: SecretStr = SecretStr("")


class MilvusTls(Section):
    """`ca_file` checks the server (without it, the system's do); `cert_file` and `key_file` show who the client is."""

    enabled: bool = False
    cert_file: str = ""
    key_file: str = ""
    ca_file: str = ""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.enabled and bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        if self.enabled and self.cert_file and not self.ca_file:
            raise ValueError("cert_file and key_file need ca_file, too")
        for path in (self.cert_file, self.key_file, self.ca_file):
            if self.enabled and path and not Path(path).is_file():
                raise ValueError(f"no such file: {path}")
        return self


class MilvusConnection(Section):
    """Where Milvus is: `host` and `port`, or a `uri` instead (a file path such as data/cache.db is Milvus Lite)."""

    host: str = "127.0.0.1"
    port: Port = 19530
    uri: MilvusUri | None = None
    database: str = "default"
    timeout: Seconds = 30.0
    auth: MilvusAuth = MilvusAuth()
    tls: MilvusTls = MilvusTls()

    @property
    def address(self) -> str:
        """What pymilvus takes: the uri as given, or one made of host, port and tls.enabled."""
        return self.uri or f"{'https' if self.tls.enabled else 'http'}://{self.host}:{self.port}"

    @property
    def is_file(self) -> bool:
        return self.uri is not None and "://" not in self.uri


def _not_taken(name: str) -> str:
    if name in RESERVED_FIELDS:
        raise ValueError("is the name of another field of the collection")
    return name


class VectorField(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,200}$"), AfterValidator(_not_taken)] = "embedding"
    dimension: Positive | None = None
    metric_type: Literal["IP", "COSINE"] = "IP"


class Index(Section):
    type: IndexType = "HNSW"
    params: dict[str, Whole] = Field(default_factory=dict)


class Collection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,200}$")] = "semantic_cache"
    description: str = ""
    max_entries: Positive | None = None
    partitions: Annotated[int, Number, Field(ge=1, le=1024)] | None = None
    vector_field: VectorField = VectorField()
    index: Index = Index()


class Search(Section):
    params: dict[str, Whole] = Field(default_factory=dict)
    topk: Annotated[int, Number, Field(ge=1, le=100)] = 5
    consistency_level: Literal["Strong", "Session", "Bounded", "Eventually"] = "Bounded"

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        if self.params.get("ef", self.topk) < self.topk:
            raise ValueError(f"params.ef ({self.params['ef']}) must not be less than topk ({self.topk})")
        return self


class Milvus(Section):
    connection: MilvusConnection = MilvusConnection()
    collection: Collection = Collection()
    search: Search = Search()


class LocalTriton(Section):
    http_port: Port = 8000
    metrics_port: Port = 8002


class LocalMilvus(Section):
    metrics_port: Port = 9091


class LocalVllm(Section):
    port: Port = 8810


class Local(Section):
    """What `make serve` may start on this machine beside the gateway."""

    triton: LocalTriton | None = None
    milvus: LocalMilvus | None = None
    vllm: LocalVllm | None = None


class Config(Section):
    listen: Listen = Listen()
    tenants: tuple[Tenant, ...] = ()
    data_dir: Path = Path("data")
    triton: Triton = Triton()
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    policy: Policy | None = None
    policies: dict[Name, Policy] = Field(default_factory=dict)
    upstream: Upstream = Upstream()
    semantic_cache: SemanticCache = SemanticCache()
    feedback: Feedback = Feedback()
    log_prompts: bool = False
    batch: Batch = Batch()
    local: Local = Local()
    milvus: Annotated[Milvus, Field(exclude=True)] = Milvus()
    source: Annotated[Path, Field(exclude=True)] = Path("config.yaml")

    @property
    def aliases(self) -> dict[str, Policy]:
        """Each policy by the name that clients ask for; `policy` is that of `auto`."""
        return {**({AUTO: self.policy} if self.policy else {}), **self.policies}

    @property
    def policy_keys(self) -> dict[str, str]:
        """Where the policy of each alias stands in the file."""
        keys = {alias: f"policies.{alias}" for alias in self.policies}
        return {AUTO: "policy", **keys} if self.policy else keys

    @property
    def longest_ttl_seconds(self) -> int:
        """Of the cache, for any answer."""
        rules = (rule.cache_ttl_seconds or 0 for policy in self.aliases.values() for rule in policy.rules)
        return max(self.semantic_cache.ttl_seconds, *rules, 0)

    def model(self, name: str) -> Model | None:
        return next((model for model in self.models if model.name == name), None)

    def fallbacks(self, model: Model) -> tuple[Model, ...]:
        """The models that answer, in this order, when `model` cannot."""
        found = (self.model(name) for name in model.fallback)
        return tuple(other for other in found if other is not None)


def load(path: str | os.PathLike[str]) -> Config:
    """Read and check the configuration at `path`; raises `ConfigError`."""
    source = Path(path)
    tree = read(source)
    for key in ("milvus", "source"):  # filled in here, never by the file
        if key in tree:
            raise ConfigError(line(source, key, tree[key], "unknown key"))
    config = validate(Config, tree, source).model_copy(update={"source": source})
    problems = [line(source, *problem) for problem in _inconsistencies(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    backend = config.semantic_cache.backend_config_path
    if config.semantic_cache.backend_type == "milvus" and backend is not None:
        milvus = validate(Milvus, read(backend, f"semantic_cache.backend_config_path in {source}"), backend)
        config = config.model_copy(update={"milvus": milvus})
        if milvus.connection.is_file and config.listen.workers > 1:
            words = "a file of Milvus Lite takes one process, and listen.workers is more"
            raise ConfigError(line(backend, "connection.uri", milvus.connection.uri, words))
        if milvus.connection.is_file and milvus.collection.partitions is not None:
            words = "a file of Milvus Lite has no partitions"
            raise ConfigError(line(backend, "collection.partitions", milvus.collection.partitions, words))
    return config


def check_against(config: Config, labels: Sequence[str], dimension: int, abilities: Sequence[str] = ()) -> None:
    """Check what only the weights know: the categories that rules name, the embedding's dimension, the abilities."""
    problems = [
        line(config.source, f"{key}.category", name, f"unknown category (known: {', '.join(labels)})")
        for key, condition in _conditions(config)
        for name in condition.category
        if name not in labels
    ]
    configured = config.milvus.collection.vector_field.dimension
    if configured is not None and configured != dimension:
        source = config.semantic_cache.backend_config_path or config.source
        key = "collection.vector_field.dimension"
        problems.append(line(source, key, configured, f"the embedder gives {dimension}; change it or leave it out"))
    problems += [line(config.source, *problem) for problem in _missing_abilities(config, abilities)]
    if problems:
        raise ConfigError("\n".join(problems))


def _inconsistencies(config: Config) -> Iterator[tuple[str, object, str]]:
    names = [model.name for model in config.models]
    yield from _exposed(config)
    yield from _misfits(config, [*config.aliases, *names, EMBEDDER])
    yield from _repeated("models", names, taken=(AUTO, EMBEDDER, *config.aliases))
    for i, model in enumerate(config.models):
        yield from _unusable(f"models[{i}]", model, names)
    yield from _unusable_policies(config, names)
    cache = config.semantic_cache
    if cache.backend_type == "milvus" and cache.backend_config_path is None:
        yield "semantic_cache.backend_config_path", None, "missing: backend_type milvus needs it"
    if cache.online.judge is not None and cache.online.judge not in names:
        yield "semantic_cache.online.judge", cache.online.judge, f"unknown model (known: {', '.join(names)})"


def _exposed(config: Config) -> Iterator[tuple[str, object, str]]:
    """A gateway that others reach without a key, unless the file says that this is meant."""
    listen = config.listen
    if not config.tenants and not listen.is_local and not listen.allow_anonymous:
        words = "others reach it and there are no tenants: configure some, or say listen.allow_anonymous: true"
        yield "listen.host", listen.host, words
    if config.tenants and listen.allow_anonymous:
        yield "listen.allow_anonymous", True, "cannot stand beside tenants"


def _misfits(config: Config, names: list[str]) -> Iterator[tuple[str, object, str]]:
    """What is wrong with the tenants, when clients may ask for `names`."""
    yield from _repeated("tenants", [tenant.name for tenant in config.tenants], taken=())
    taken = {config.listen.admin_key_sha256}
    for i, tenant in enumerate(config.tenants):
        for j, key in enumerate(tenant.key_sha256):
            if key in taken:
                yield f"tenants[{i}].key_sha256[{j}]", key, "is given twice"
            taken.add(key)
        for j, name in enumerate(tenant.models or ()):
            if name not in names:
                yield f"tenants[{i}].models[{j}]", name, f"unknown model (known: {', '.join(names)})"


def _unusable(key: str, model: Model, names: list[str]) -> Iterator[tuple[str, object, str]]:
    urls = [endpoint.url for endpoint in model.endpoints]
    for i, url in enumerate(urls):
        if url in urls[:i]:
            yield f"{key}.endpoints[{i}]", url, "is given twice"
    for i, name in enumerate(model.fallback):
        if name not in names:
            yield f"{key}.fallback[{i}]", name, f"unknown model (known: {', '.join(names)})"
        elif name == model.name:
            yield f"{key}.fallback[{i}]", name, "is the model itself"
        elif name in model.fallback[:i]:
            yield f"{key}.fallback[{i}]", name, "is given twice"


def _unusable_policies(config: Config, names: list[str]) -> Iterator[tuple[str, object, str]]:
    if not config.aliases:
        yield "policy", None, "missing key"
    if config.policy is not None and AUTO in config.policies:
        yield f"policies.{AUTO}", None, "is given twice: policy is its short form"
    known = {"alias": list(config.aliases), "tenant": [tenant.name for tenant in config.tenants]}
    for key, condition in _conditions(config):
        for kind, name in (*(("alias", name) for name in condition.alias), *(("tenant", t) for t in condition.tenant)):
            if name not in known[kind]:
                yield f"{key}.{kind}", name, f"unknown {kind} (known: {', '.join(known[kind]) or 'none'})"
    for alias, policy in config.aliases.items():
        yield from _unusable_policy(config.policy_keys[alias], policy, names)


def _unusable_policy(key: str, policy: Policy, names: list[str]) -> Iterator[tuple[str, object, str]]:
    yield from _repeated(f"{key}.rules", [rule.name for rule in policy.rules], taken=BUILT_IN_RULES)
    shared: list[str] = []
    for i, rule in enumerate(policy.rules):
        yield from _contradictions(f"{key}.rules[{i}]", rule)
        named = [("model", rule.model), *(("among", model) for model in rule.among)]
        if rule.share is not None:
            named.append(("share.model", rule.share.model))
            yield from _unlimited(f"{key}.rules[{i}].share.model", rule.share.model, policy.default, shared)
            shared.append(rule.share.model)
        for where, model in named:
            if model is not None and model not in names:
                yield f"{key}.rules[{i}].{where}", model, f"unknown model (known: {', '.join(names)})"
    if policy.default not in names:
        yield f"{key}.default", policy.default, f"unknown model (known: {', '.join(names)})"


def _unlimited(key: str, model: str, default: str, shared: list[str]) -> Iterator[tuple[str, object, str]]:
    """A share that could not be kept."""
    if model == default:
        yield key, model, "is the default, too, so that its share has no limit"
    if model in shared:
        yield key, model, "has its share from another rule"


def _conditions(config: Config) -> Iterator[tuple[str, Condition]]:
    """All conditions of all policies, each with its key."""
    for alias, policy in config.aliases.items():
        for i, rule in enumerate(policy.rules):
            yield from rule.when.parts(f"{config.policy_keys[alias]}.rules[{i}].when")


def _contradictions(key: str, rule: Rule) -> Iterator[tuple[str, object, str]]:
    ways = {"model": rule.model, "cheapest_within": rule.cheapest_within, "share": rule.share}
    given = [name for name, value in ways.items() if value is not None]
    if not given:
        yield f"{key}.model", None, "missing key (or cheapest_within, or share instead)"
    for name in given[1:]:
        shown = None if name == "share" else ways[name]
        yield f"{key}.{name}", shown, f"cannot stand beside {given[0]}"
    if rule.cheapest_within is None and rule.among:
        yield f"{key}.among", list(rule.among), "goes with cheapest_within"
    if given == ["model"] and rule.when == ALWAYS and not rule.changes:
        yield f"{key}.when", None, "missing key"  # a model for all prompts is what policy.default says


def _missing_abilities(config: Config, abilities: Sequence[str]) -> Iterator[tuple[str, object, str]]:
    for i, model in enumerate(config.models):
        if model.ability is not None and model.ability not in abilities:
            known = ", ".join(abilities) or "none"
            yield f"models[{i}].ability", model.ability, f"unknown ability (known: {known})"
    able = [model.name for model in config.models if model.ability is not None or model.name in abilities]
    for alias, policy in config.aliases.items():
        for i, rule in enumerate(policy.rules):
            yield from _unable(f"{config.policy_keys[alias]}.rules[{i}]", rule, able)


def _unable(key: str, rule: Rule, able: list[str]) -> Iterator[tuple[str, object, str]]:
    """What a choice lacks when the models with an ability are `able`."""
    unable = [name for name in rule.among if name not in able]
    for name in unable:
        yield f"{key}.among", name, "has no ability; name one in models[].ability"
    if rule.cheapest_within is not None and not unable and len(set(rule.among or able)) < 2:
        problem = f"needs two models with an ability (there are: {', '.join(rule.among or able) or 'none'})"
        yield f"{key}.cheapest_within", rule.cheapest_within, problem


def _repeated(key: str, names: list[str], taken: tuple[str, ...]) -> Iterator[tuple[str, object, str]]:
    for i, name in enumerate(names):
        if name in taken:
            yield f"{key}[{i}].name", name, "is the gateway's own; choose another name"
        if name in names[:i]:
            yield f"{key}[{i}].name", name, "is given twice"
