"""Configuration: one frozen tree, read once from YAML, every key checked.

`load` reads the file, replaces `${NAME}` and `${NAME:-default}` in values by environment variables, validates, and
follows `semantic_cache.backend_config_path`. Whatever is wrong is a `ConfigError` whose lines each name file, key and
value. What depends on the trained weights (categories, dimension, abilities) is checked by `check_against`, once the
manifests have been read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from gateway.checked import ConfigError as ConfigError
from gateway.checked import Section, line, read, validate
from gateway.values import (
    Address,
    Amount,
    Endpoint,
    HeaderSecret,
    MilvusUri,
    Name,
    Number,
    Port,
    Positive,
    Real,
    Seconds,
    Unit,
    Whole,
)

AUTO = "auto"
DEFAULT_RULE = "default"  # none of the rules held
NAMED_RULE = "named"  # the client asked for a model by its name
BUILT_IN_RULES = (DEFAULT_RULE, NAMED_RULE)
RESERVED_FIELDS = ("key", "scope", "question", "answer", "expires_at")  # of the collection, beside the vector

IndexType = Literal[
    "HNSW", "FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "SCANN", "DISKANN", "AUTOINDEX", "GPU_IVF_FLAT", "GPU_CAGRA"
]


class Listen(Section):
    host: str = "127.0.0.1"
    port: Port = 8801
    max_body_bytes: Positive = 4 * 1024 * 1024


class Triton(Section):
    address: Address = "127.0.0.1:8001"
    timeout_seconds: Seconds = 2.0
    model_repository: Path = Path("model_repository")


class Price(Section):
    """Price of a million tokens, in whatever currency the operator counts."""

    input: Amount
    output: Amount


class Model(Section):
    """A model behind the gateway. `name` is what its endpoints serve it as."""

    name: Name
    endpoints: Annotated[tuple[Endpoint, ...], Field(min_length=1)]
    api_key: HeaderSecret | None = None
    price_per_million_tokens: Price
    context_window: Positive
    size: Literal["small", "medium", "large"]
    ability: str | None = None

    @property
    def ability_name(self) -> str:
        """What its ability is called in the classifier's manifest, if it is there."""
        return self.name if self.ability is None else self.ability


class Upstream(Section):
    connect_timeout_seconds: Seconds = 5.0
    idle_timeout_seconds: Seconds = 300.0


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


class Condition(Section):
    """All that is given must hold: one of the categories, a complexity and prompt_tokens in range, one keyword."""

    category: tuple[str, ...] = ()
    complexity: Annotated[Range, AfterValidator(_probable)] | None = None
    prompt_tokens: Range | None = None
    keywords: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not (self.category or self.complexity or self.prompt_tokens or self.keywords):
            raise ValueError("needs at least one of category, complexity, prompt_tokens, keywords")
        return self


ALWAYS = Condition.model_construct()  # what a rule without `when` means; a file cannot say it


class Rule(Section):
    """When it holds, `model`, or the cheapest of nearly the best predicted quality answers."""

    name: Name
    when: Condition = ALWAYS
    model: str | None = None
    cheapest_within: Unit | None = None
    among: tuple[str, ...] = ()


class Policy(Section):
    """Ordered rules, the first that holds decides; `default` when none does."""

    rules: tuple[Rule, ...] = ()
    default: str


class SemanticCache(Section):
    enabled: bool = True
    backend_type: Literal["memory", "milvus"] = "memory"
    backend_config_path: Path | None = None
    similarity_threshold: Unit = 0.8
    max_entries: Positive = 1000
    ttl_seconds: Positive = 3600
    eviction_policy: Literal["fifo", "lru", "lfu"] = "fifo"


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
    data_dir: Path = Path("data")
    triton: Triton = Triton()
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    policy: Policy
    upstream: Upstream = Upstream()
    semantic_cache: SemanticCache = SemanticCache()
    local: Local = Local()
    milvus: Annotated[Milvus, Field(exclude=True)] = Milvus()
    source: Annotated[Path, Field(exclude=True)] = Path("config.yaml")

    def model(self, name: str) -> Model | None:
        return next((model for model in self.models if model.name == name), None)


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
    return config


def check_against(config: Config, labels: Sequence[str], dimension: int, abilities: Sequence[str] = ()) -> None:
    """Check what only the weights know: the categories that rules name, the embedding's dimension, the abilities."""
    problems = [
        line(config.source, f"policy.rules[{i}].when.category", name, f"unknown category (known: {', '.join(labels)})")
        for i, rule in enumerate(config.policy.rules)
        for name in rule.when.category
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
    yield from _repeated("models", names, taken=(AUTO,))
    yield from _repeated("policy.rules", [rule.name for rule in config.policy.rules], taken=BUILT_IN_RULES)
    for i, rule in enumerate(config.policy.rules):
        yield from _contradictions(f"policy.rules[{i}]", rule)
        for key, model in (("model", rule.model), *(("among", model) for model in rule.among)):
            if model is not None and model not in names:
                yield f"policy.rules[{i}].{key}", model, f"unknown model (known: {', '.join(names)})"
    if config.policy.default not in names:
        yield "policy.default", config.policy.default, f"unknown model (known: {', '.join(names)})"
    cache = config.semantic_cache
    if cache.backend_type == "milvus" and cache.backend_config_path is None:
        yield "semantic_cache.backend_config_path", None, "missing: backend_type milvus needs it"


def _contradictions(key: str, rule: Rule) -> Iterator[tuple[str, object, str]]:
    if rule.model is None and rule.cheapest_within is None:
        yield f"{key}.model", None, "missing key (or cheapest_within instead)"
    if rule.model is not None and rule.cheapest_within is not None:
        yield f"{key}.cheapest_within", rule.cheapest_within, "cannot stand beside model"
    if rule.cheapest_within is None and rule.among:
        yield f"{key}.among", list(rule.among), "goes with cheapest_within"
    if rule.cheapest_within is None and rule.when == ALWAYS:
        yield f"{key}.when", None, "missing key"  # a model for all prompts is what policy.default says


def _missing_abilities(config: Config, abilities: Sequence[str]) -> Iterator[tuple[str, object, str]]:
    for i, model in enumerate(config.models):
        if model.ability is not None and model.ability not in abilities:
            known = ", ".join(abilities) or "none"
            yield f"models[{i}].ability", model.ability, f"unknown ability (known: {known})"
    able = [model.name for model in config.models if model.ability is not None or model.name in abilities]
    for i, rule in enumerate(config.policy.rules):
        unable = [name for name in rule.among if name not in able]
        for name in unable:
            yield f"policy.rules[{i}].among", name, "has no ability; name one in models[].ability"
        if rule.cheapest_within is not None and not unable and len(set(rule.among or able)) < 2:
            problem = f"needs two models with an ability (there are: {', '.join(rule.among or able) or 'none'})"
            yield f"policy.rules[{i}].cheapest_within", rule.cheapest_within, problem


def _repeated(key: str, names: list[str], taken: tuple[str, ...]) -> Iterator[tuple[str, object, str]]:
    for i, name in enumerate(names):
        if name in taken:
            yield f"{key}[{i}].name", name, "is the gateway's own; choose another name"
        if name in names[:i]:
            yield f"{key}[{i}].name", name, "is given twice"
