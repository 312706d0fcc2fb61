"""Configuration: one frozen tree, read once from YAML, every key checked.

`load` reads the file, replaces `${NAME}` and `${NAME:-default}` in values by environment variables, validates, and
follows `semantic_cache.backend_config_path`. Whatever is wrong is a `ConfigError` whose lines each name file, key and
value. What depends on the trained weights (categories, dimension) is checked by `check_against`, once the manifests
have been read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

AUTO = "auto"
DEFAULT_RULE = "default"  # none of the rules held
NAMED_RULE = "named"  # the client asked for a model by its name
RESERVED_FIELDS = ("key", "scope", "question", "answer", "expires_at")  # of the collection, beside the vector
BUILT_IN_RULES = (DEFAULT_RULE, NAMED_RULE)


class ConfigError(Exception):
    """The configuration cannot be used; one line per problem, each naming file, key and value."""


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
        usable = parts.hostname is not None and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be an address with a host and, if any, a port from 1 to 65535")
    if "@" in parts.netloc:
        raise ValueError("must not hold credentials")
    return value.rstrip("/")


def _endpoint(value: object) -> object:
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


def _header(secret: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", secret.get_secret_value()):
        raise ValueError("must be printable ASCII without spaces, and not empty")
    return secret


def _not_taken(name: str) -> str:
    if name in RESERVED_FIELDS:
        raise ValueError("is the name of another field of the collection")
    return name


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
Endpoint = Annotated[str, BeforeValidator(_endpoint)]
T = TypeVar("T", bound="Section")


IndexType = Literal[
    "HNSW", "FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "SCANN", "DISKANN", "AUTOINDEX", "GPU_IVF_FLAT", "GPU_CAGRA"
]


class Section(BaseModel):
    """A mapping of the file: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
    api_key: Annotated[SecretStr, AfterValidator(_header)] | None = None
    price_per_million_tokens: Price
    context_window: Positive
    size: Literal["small", "medium", "large"]


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


class Rule(Section):
    name: Name
    when: Condition
    model: str


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
    uri: Annotated[str, BeforeValidator(_milvus_uri)] | None = None
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


class VectorField(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,200}$"), AfterValidator(_not_taken)] = "embedding"
    dimension: Positive | None = None
    metric_type: Literal["IP", "COSINE"] = "IP"


class Index(Section):
    type: IndexType = "HNSW"
    params: dict[str, Whole] = {}


class Collection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,200}$")] = "semantic_cache"
    description: str = ""
    vector_field: VectorField = VectorField()
    index: Index = Index()


class Search(Section):
    params: dict[str, Whole] = {}
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
    tree = _read(source)
    for key in ("milvus", "source"):  # filled in here, never by the file
        if key in tree:
            raise ConfigError(_line(source, key, tree[key], "unknown key"))
    config = validate(Config, tree, source).model_copy(update={"source": source})
    problems = [_line(source, *problem) for problem in _inconsistencies(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    backend = config.semantic_cache.backend_config_path
    if config.semantic_cache.backend_type == "milvus" and backend is not None:
        milvus = validate(Milvus, _read(backend, f"semantic_cache.backend_config_path in {source}"), backend)
        config = config.model_copy(update={"milvus": milvus})
    return config


def check_against(config: Config, labels: Sequence[str], dimension: int) -> None:
    """Check what only the weights know: the categories that rules name and the embedding's dimension."""
    problems = [
        _line(config.source, f"policy.rules[{i}].when.category", name, f"unknown category (known: {', '.join(labels)})")
        for i, rule in enumerate(config.policy.rules)
        for name in rule.when.category
        if name not in labels
    ]
    configured = config.milvus.collection.vector_field.dimension
    if configured is not None and configured != dimension:
        source = config.semantic_cache.backend_config_path or config.source
        key = "collection.vector_field.dimension"
        problems.append(_line(source, key, configured, f"the embedder gives {dimension}; change it or leave it out"))
    if problems:
        raise ConfigError("\n".join(problems))


def _inconsistencies(config: Config) -> Iterator[tuple[str, object, str]]:
    names = [model.name for model in config.models]
    yield from _repeated("models", names, taken=(AUTO,))
    yield from _repeated("policy.rules", [rule.name for rule in config.policy.rules], taken=BUILT_IN_RULES)
    for i, rule in enumerate(config.policy.rules):
        if rule.model not in names:
            yield f"policy.rules[{i}].model", rule.model, f"unknown model (known: {', '.join(names)})"
    if config.policy.default not in names:
        yield "policy.default", config.policy.default, f"unknown model (known: {', '.join(names)})"
    cache = config.semantic_cache
    if cache.backend_type == "milvus" and cache.backend_config_path is None:
        yield "semantic_cache.backend_config_path", None, "missing: backend_type milvus needs it"


def _repeated(key: str, names: list[str], taken: tuple[str, ...]) -> Iterator[tuple[str, object, str]]:
    for i, name in enumerate(names):
        if name in taken:
            yield f"{key}[{i}].name", name, "is the gateway's own; choose another name"
        if name in names[:i]:
            yield f"{key}[{i}].name", name, "is given twice"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: Path, key: str = "") -> dict[str, object]:
    """The mapping in a YAML file, environment variables filled in; `key` is what named the file, if one did."""
    where = f" (named by {key})" if key else ""
    try:
        tree = _parse(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{where}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text{where}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values{where}")
    environment = _Environment(path)
    try:
        filled = {str(key): environment.replaced(value, str(key)) for key, value in tree.items()}
    except RecursionError:
        raise ConfigError(f"{path}: contains itself") from None
    if environment.problems:
        raise ConfigError("\n".join(environment.problems))
    return filled


def _parse(text: str, path: Path) -> object:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:  # its own words quote the file, which may hold a secret
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}: line {line}: is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Environment:
    """Replaces ${NAME} and ${NAME:-default} in strings; the default stands for unset and for empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.problems: list[str] = []

    def replaced(self, value: object, key: str = "") -> object:
        """`value`, the one of `key`, with the variables in every string below it filled in."""
        if isinstance(value, str):
            return _VARIABLE.sub(lambda match: self._look_up(match, key), value)
        if isinstance(value, dict):
            return {str(k): self.replaced(v, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
        if isinstance(value, list):
            return [self.replaced(v, f"{key}[{i}]") for i, v in enumerate(value)]
        return value

    def _look_up(self, match: re.Match[str], key: str) -> str:
        name, default = match.groups()
        found = os.environ.get(name)
        if found is None and default is None:
            self.problems.append(f"{self._path}: {key}: environment variable {name} is not set")
        return found or default or ""


def validate(section: type[T], tree: object, path: Path) -> T:
    """Check `tree`, read from `path`, against `section`; raises `ConfigError`."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        causes = [e for e in errors if not any(_inside(other["loc"], e["loc"]) for other in errors)]
        problems = [_line(path, _key(e["loc"]), e["input"], _reason(e["type"], e["msg"])) for e in causes]
        raise ConfigError("\n".join(problems)) from None


def _inside(location: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _key(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _reason(kind: str, message: str) -> str:
    known = {"missing": "missing key", "extra_forbidden": "unknown key"}
    return known.get(kind, message.removeprefix("Value error, "))


_SECRET = re.compile(r"(api_?key|pass\w*|secret\w*|auth\w*|token|credential\w*)(\[\d+\])?$", re.IGNORECASE)
_CREDENTIALS = re.compile(r"[^\s/'\"]*@")


def _line(path: Path, key: str, value: object, problem: str) -> str:
    """`file: key: problem (got value)`; secrets and mappings are not shown, long values cut."""
    where = f"{path}: {key}" if key else str(path)
    if problem == "missing key" or value is None or _holds_mappings(value):
        return f"{where}: {problem}"
    shown = "***" if _SECRET.search(key) else _CREDENTIALS.sub("***@", repr(value))
    return f"{where}: {problem} (got {shown if len(shown) <= 80 else shown[:77] + '...'})"


def _holds_mappings(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and any(map(_holds_mappings, value)))
