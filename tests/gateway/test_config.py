"""The configuration: what loads, and what is refused with which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gateway.config import Config, ConfigError, Endpoint, Milvus, check_against, load
from gateway.policy import Prompt, holds

ROOT = Path(__file__).parents[2]

LABELS = (  # the categories of MMLU-Pro
    "biology",
    "business",
    "chemistry",
    "computer science",
    "economics",
    "engineering",
    "health",
    "history",
    "law",
    "math",
    "other",
    "philosophy",
    "physics",
    "psychology",
)

# The two YAML files of the reference article, comments and all; only the host is a real one.
ARTICLE_CACHE = """\
semantic_cache:
  enabled: true
  backend_type: "milvus"  # Options: "memory" or "milvus"
  backend_config_path: "config/cache/milvus.yaml"
  similarity_threshold: 0.8
  max_entries: 1000  # Only applies to memory backend
  ttl_seconds: 3600
  eviction_policy: "fifo"
"""
ARTICLE_MILVUS = """\
# Milvus connection settings
connection:
  # Milvus server host (change for production deployment)
  host: "192.168.7.20"  # For production: use your Milvus cluster endpoint
  # Milvus server port
  port: 19530  # Standard Milvus port
  # Database name (optional, defaults to "default")
  database: "default"
  # Connection timeout in seconds
  timeout: 30
  # Authentication (enable for production)
  auth:
    enabled: false  # Set to true for production
    username: ""    # Your Milvus username
    password: ""    # Your Milvus password
  # TLS/SSL configuration (recommended for production)
  tls:
    enabled: false      # Set to true for secure connections
    cert_file: ""       # Path to client certificate
    key_file: ""        # Path to client private key
    ca_file: ""         # Path to CA certificate
# Collection settings
collection:
  # Name of the collection to store cache entries
  name: "semantic_cache"
  # Description of the collection
  description: "Semantic cache for LLM request-response pairs"
  # Vector field configuration
  vector_field:
    # Name of the vector field
    name: "embedding"
    # Dimension of the embeddings (auto-detected from model at runtime)
    dimension: 384  # This value is ignored - dimension is auto-detected from the embedding model
    # Metric type for similarity calculation
    metric_type: "IP"  # Inner Product (cosine similarity for normalized vectors)
  # Index configuration for the vector field
  index:
    # Index type (HNSW is recommended for most use cases)
    type: "HNSW"
    # Index parameters
    params:
      M: 16              # Number of bi-directional links for each node
      efConstruction: 64  # Search scope during index construction
"""

SMALL = """\
models:
  - name: small
    endpoints: [http://127.0.0.1:8000]
    price_per_million_tokens: {input: 0.1, output: 0.2}
    context_window: 2048
    size: small
  - name: large
    endpoints: [http://127.0.0.1:8001, http://127.0.0.1:8002]
    price_per_million_tokens: {input: 1, output: 2}
    context_window: 8192
    size: large
policy:
  rules:
    - name: hard
      when: {complexity: {at_least: 0.5}, category: [math]}
      model: large
  default: small
"""
CHEAPEST = SMALL.replace("model: large", "cheapest_within: 0.05").replace("when: {complexity", "# when: {complexity")
WITH_MILVUS = SMALL + "semantic_cache: {backend_type: milvus, backend_config_path: milvus.yaml}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths in a configuration are relative to the working directory: an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_text(text: str) -> Config:
    Path("config.yaml").write_text(text, encoding="utf-8")
    return load("config.yaml")


def load_milvus(text: str) -> Milvus:
    Path("milvus.yaml").write_text(text, encoding="utf-8")
    return load_text(WITH_MILVUS).milvus


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    return str(caught.value).splitlines()


def milvus_problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_milvus(text)
    return str(caught.value).splitlines()


def with_value(text: str, key: str, value: object) -> str:
    """`text` with `key`, such as models[0].size, set to `value`; its parents are made as needed."""
    tree = yaml.safe_load(text)
    node, last = find(tree, key)
    if isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
    return yaml.safe_dump(tree)


def without(text: str, key: str) -> str:
    tree = yaml.safe_load(text)
    node, last = find(tree, key)
    del node[last]
    return yaml.safe_dump(tree)


def find(tree: Any, key: str) -> tuple[Any, str | int]:
    """What `key` is in, and under which name or number."""
    *parents, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", key)]
    for part in parents:
        tree = tree[part] if isinstance(part, int) else tree.setdefault(part, {})
    return tree, last


# What loads


def test_the_shipped_configuration_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load("config/config.yaml")
    check_against(config, LABELS, 384)
    assert config.listen.port == 8801
    assert config.source == Path("config/config.yaml")


def test_the_articles_files_load_as_they_are_pasted(folder: Path) -> None:
    shipped = (ROOT / "config/config.yaml").read_text(encoding="utf-8")
    pasted = re.sub(r"(?ms)^semantic_cache:.*?(?=^\S)", ARTICLE_CACHE, shipped)
    assert pasted != shipped
    (folder / "config/cache").mkdir(parents=True)
    (folder / "config/cache/milvus.yaml").write_text(ARTICLE_MILVUS, encoding="utf-8")

    config = load_text(pasted)

    check_against(config, LABELS, 384)
    assert config.semantic_cache.model_dump() == {
        "enabled": True,
        "backend_type": "milvus",
        "backend_config_path": Path("config/cache/milvus.yaml"),
        "scope": "tenant",
        "max_error_rate": 0.01,
        "similarity_threshold": 0.8,
        "online": {"check_share": 0.0, "judge": None, "answer_similarity": 0.9, "concurrent_checks": 4},
        "max_entries": 1000,
        "ttl_seconds": 3600,
        "eviction_policy": "fifo",
        "max_temperature": 1.0,
        "bypass_time_dependent": True,
        "store_tool_calls": False,
    }
    connection, collection = config.milvus.connection, config.milvus.collection
    assert connection.address == "http://192.168.7.20:19530"
    assert (connection.database, connection.timeout) == ("default", 30)
    assert not connection.auth.enabled
    assert not connection.tls.enabled
    assert collection.name == "semantic_cache"
    assert collection.description == "Semantic cache for LLM request-response pairs"
    assert collection.vector_field.model_dump() == {"name": "embedding", "dimension": 384, "metric_type": "IP"}
    assert collection.index.model_dump() == {"type": "HNSW", "params": {"M": 16, "efConstruction": 64}}


def test_what_is_left_out_has_a_default() -> None:
    config = load_text(SMALL)
    assert config.listen.host == "127.0.0.1"
    assert config.semantic_cache.backend_type == "memory"
    assert config.model("large") is config.models[1]
    assert config.model("none") is None


def test_an_address_ends_without_a_slash() -> None:
    config = load_text(with_value(SMALL, "models[0].endpoints[0]", "https://vllm.example/serve/"))
    assert config.models[0].endpoints == (Endpoint(url="https://vllm.example/serve"),)


def test_endpoints_with_weights_and_fallbacks() -> None:
    text = with_value(SMALL, "models[1].endpoints[1]", {"url": "http://127.0.0.1:8002/", "weight": 2.5})
    config = load_text(with_value(text, "models[0].fallback", ["large"]))
    large = config.models[1]
    assert [(endpoint.url, endpoint.weight) for endpoint in large.endpoints] == [
        ("http://127.0.0.1:8001", 1),
        ("http://127.0.0.1:8002", 2.5),
    ]
    assert config.fallbacks(config.models[0]) == (large,)
    assert config.fallbacks(large) == ()


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("models[0].endpoints[0]", {"weight": 2}, "models[0].endpoints[0].url: missing key"),
        ("models[0].endpoints[0]", {"url": "127.0.0.1", "weight": 2}, "models[0].endpoints[0].url: must be an http://"),
        ("models[0].endpoints[0]", {"url": "http://h/v1"}, "models[0].endpoints[0].url: leave out /v1"),
        ("models[0].endpoints[0]", {"url": "http://h", "x": 2}, "models[0].endpoints[0].x: unknown key (got 2)"),
        ("models[1].endpoints[1]", "http://127.0.0.1:8001/", "models[1].endpoints[1]: is given twice"),
        ("models[0].fallback", ["medium"], "models[0].fallback[0]: unknown model (known: small, large)"),
        ("models[0].fallback", ["small"], "models[0].fallback[0]: is the model itself"),
        ("models[0].fallback", ["large", "large"], "models[0].fallback[1]: is given twice"),
        ("models[0].fallback", "large", "models[0].fallback: "),
        ("upstream.ejection.minutes", 1, "upstream.ejection.minutes: unknown key (got 1)"),
        ("upstream.health_check.path", "health", "upstream.health_check.path: "),
    ],
)
def test_endpoints_and_fallbacks_that_cannot_be_meant(key: str, value: object, problem: str) -> None:
    (line,) = problems(with_value(SMALL, key, value))
    assert line.startswith(f"config.yaml: {problem}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("models[0].endpoints[0].weight", 0),
        ("models[0].endpoints[0].weight", 1001),
        ("models[0].endpoints[0].weight", True),
        ("models[0].endpoints[0].weight", float("nan")),
        ("upstream.first_byte_timeout_seconds", 0),
        ("upstream.total_timeout_seconds", float("inf")),
        ("upstream.retries", -1),
        ("upstream.retries", 1.5),
        ("upstream.retry_statuses[0]", 429),
        ("upstream.retry_statuses[0]", 600),
        ("upstream.timeout_retry_share", 1.1),
        ("upstream.max_wait_seconds", -1),
        ("upstream.max_answer_bytes", 0),
        ("upstream.health_check.interval_seconds", 0),
        ("upstream.health_check.timeout_seconds", "long"),
        ("upstream.ejection.consecutive_failures", 0),
        ("upstream.ejection.seconds", -5),
        ("upstream.ejection.max_share", 2),
    ],
)
def test_a_wrong_value_for_endpoints_and_upstream(key: str, value: object) -> None:
    text = with_value(SMALL, "models[0].endpoints[0]", {"url": "http://127.0.0.1:8000"})
    (line,) = problems(with_value(with_value(text, "upstream.retry_statuses", [502]), key, value))
    assert line.startswith(f"config.yaml: {key}: ")


def test_a_loaded_value_never_changes() -> None:
    config = load_text(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        config.listen.port = 1


def test_the_memory_backend_reads_no_backend_file() -> None:
    config = load_text(SMALL + "semantic_cache: {backend_type: memory, backend_config_path: nowhere.yaml}")
    assert config.milvus == Milvus()


def test_an_anchor_can_be_merged() -> None:
    config = load_text(
        SMALL.replace("{input: 0.1, output: 0.2}", "&price {input: 0.1, output: 0.2}").replace(
            "{input: 1, output: 2}", "{<<: *price, output: 9}"
        )
    )
    assert config.models[1].price_per_million_tokens.model_dump() == {"input": 0.1, "output": 9}


# What is refused: each problem is one line that names file, key and value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lisen", 5),
        ("listen.prot", 8802),
        ("models[0].weight", 3),
        ("policy.rules[0].when.mood", "sad"),
        ("local.vllm.ports", 8810),
    ],
)
def test_an_unknown_key(key: str, value: object) -> None:
    assert f"config.yaml: {key}: unknown key (got {value!r})" in problems(with_value(SMALL, key, value))


@pytest.mark.parametrize("key", ["milvus", "source"])
def test_the_file_cannot_fill_in_what_load_fills_in(key: str) -> None:
    assert problems(with_value(SMALL, key, "x.yaml")) == [f"config.yaml: {key}: unknown key (got 'x.yaml')"]


@pytest.mark.parametrize(
    "key",
    [
        "models",
        "policy",
        "policy.default",
        "models[0].name",
        "models[0].endpoints",
        "models[1].price_per_million_tokens.output",
        "policy.rules[0].when",
    ],
)
def test_a_missing_key(key: str) -> None:
    assert f"config.yaml: {key}: missing key" in problems(without(SMALL, key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("listen.port", "high"),
        ("listen.port", 0),
        ("listen.port", 65536),
        ("listen.port", True),
        ("listen.max_body_bytes", 0),
        ("listen.host", 127),
        ("triton.address", "127.0.0.1"),
        ("triton.address", "http://127.0.0.1:8001"),
        ("triton.address", "127.0.0.1:99999"),
        ("triton.address", "127.0.0.1:0"),
        ("triton.timeout_seconds", 0),
        ("triton.timeout_seconds", float("inf")),
        ("models", []),
        ("models[0].name", ""),
        ("models[0].name", "two words"),
        ("models[0].name", 7),
        ("models[0].endpoints", []),
        ("models[0].endpoints", "http://127.0.0.1:8000"),
        ("models[0].endpoints[0]", "127.0.0.1:8000"),
        ("models[0].endpoints[0]", "ftp://127.0.0.1:8000"),
        ("models[0].endpoints[0]", "http://"),
        ("models[0].endpoints[0]", "http://[::1"),
        ("models[0].endpoints[0]", "http://127.0.0.1:8000/?a=b"),
        ("models[0].endpoints[0]", "http://127.0.0.1:99999"),
        ("models[0].endpoints[0]", "http://127.0.0.1:port"),
        ("models[0].endpoints[0]", "http://two words"),
        ("models[0].endpoints[0]", "http://two..dots"),
        ("models[0].endpoints[0]", "http://" + 64 * "a"),
        ("models[0].context_window", -1),
        ("models[0].price_per_million_tokens.input", -0.1),
        ("models[0].price_per_million_tokens.input", float("nan")),
        ("models[0].size", "tiny"),
        ("models[0].ability", 7),
        ("policy.rules[0].cheapest_within", 1.5),
        ("policy.rules[0].cheapest_within", -0.1),
        ("policy.rules[0].cheapest_within", True),
        ("policy.rules[0].cheapest_within", float("nan")),
        ("policy.rules[0].among", "small"),
        ("policy.rules", "hard"),
        ("policy.rules[0].name", "with\nnewline"),
        ("policy.rules[0].when.category", "math"),
        ("policy.rules[0].when.complexity", 0.5),
        ("policy.rules[0].when.complexity.at_least", float("nan")),
        ("policy.rules[0].when.keywords[0]", ""),
        ("semantic_cache.enabled", "perhaps"),
        ("semantic_cache.backend_type", "redis"),
        ("semantic_cache.similarity_threshold", 1.1),
        ("semantic_cache.similarity_threshold", float("nan")),
        ("semantic_cache.max_entries", 0),
        ("semantic_cache.max_entries", True),
        ("semantic_cache.ttl_seconds", 0),
        ("semantic_cache.eviction_policy", "random"),
        ("local.vllm.port", 70000),
    ],
)
def test_a_value_that_cannot_be(key: str, value: object) -> None:
    text = with_value(with_value(SMALL, "policy.rules[0].when.keywords", []), key, value)
    lines = [line for line in problems(text) if line.startswith(f"config.yaml: {key}: ")]
    assert len(lines) == 1
    assert lines[0].endswith(f"(got {value!r})")


@pytest.mark.parametrize(
    ("key", "value"),
    [("models[1].name", "small"), ("models[2]", {**yaml.safe_load(SMALL)["models"][0]})],
)
def test_a_model_given_twice(key: str, value: object) -> None:
    index = key[len("models[")]
    assert f"config.yaml: models[{index}].name: is given twice (got 'small')" in problems(with_value(SMALL, key, value))


def test_a_rule_given_twice() -> None:
    text = with_value(SMALL, "policy.rules[1]", yaml.safe_load(SMALL)["policy"]["rules"][0])
    assert problems(text) == ["config.yaml: policy.rules[1].name: is given twice (got 'hard')"]


def test_a_model_called_auto() -> None:
    (line,) = problems(with_value(with_value(SMALL, "models[0].name", "auto"), "policy.default", "auto"))
    assert line.startswith("config.yaml: models[0].name: ")
    assert line.endswith("(got 'auto')")


@pytest.mark.parametrize("key", ["policy.default", "policy.rules[0].model"])
def test_a_policy_that_names_an_unknown_model(key: str) -> None:
    expected = f"config.yaml: {key}: unknown model (known: small, large) (got 'huge')"
    assert problems(with_value(SMALL, key, "huge")) == [expected]


def test_a_rule_says_who_answers() -> None:
    expected = ["config.yaml: policy.rules[0].model: missing key (or cheapest_within, or share instead)"]
    assert problems(without(SMALL, "policy.rules[0].model")) == expected


def test_a_rule_says_it_once() -> None:
    expected = ["config.yaml: policy.rules[0].cheapest_within: cannot stand beside model (got 0.05)"]
    assert problems(with_value(SMALL, "policy.rules[0].cheapest_within", 0.05)) == expected


def test_among_stands_beside_cheapest_within() -> None:
    expected = ["config.yaml: policy.rules[0].among: goes with cheapest_within (got ['small', 'large'])"]
    assert problems(with_value(SMALL, "policy.rules[0].among", ["small", "large"])) == expected


def test_a_choice_among_an_unknown_model() -> None:
    text = with_value(CHEAPEST, "policy.rules[0].among", ["small", "huge"])
    expected = ["config.yaml: policy.rules[0].among: unknown model (known: small, large) (got 'huge')"]
    assert problems(text) == expected


def test_a_choice_needs_no_condition() -> None:
    when = load_text(CHEAPEST).aliases["auto"].rules[0].when
    assert holds(when, Prompt("", 0, None, None))


@pytest.mark.parametrize("when", [{}, {"category": []}, {"complexity": {}}])
def test_a_condition_that_says_nothing(when: dict[str, Any]) -> None:
    (line,) = problems(with_value(SMALL, "policy.rules[0].when", when))
    assert line.startswith("config.yaml: policy.rules[0].when")
    assert "needs" in line


@pytest.mark.parametrize("at_least", [0.5, 0.6])
def test_a_range_that_nothing_is_in(at_least: float) -> None:
    (line,) = problems(with_value(SMALL, "policy.rules[0].when.complexity", {"at_least": at_least, "below": 0.5}))
    assert line == "config.yaml: policy.rules[0].when.complexity: at_least must be less than below"


def test_a_value_given_twice() -> None:
    (line,) = problems(SMALL + "data_dir: a\ndata_dir: b\n")
    assert line.startswith("config.yaml: ")
    assert "'data_dir' is given twice" in line


def test_milvus_without_a_backend_file() -> None:
    (line,) = problems(SMALL + "semantic_cache: {backend_type: milvus}")
    assert line.startswith("config.yaml: semantic_cache.backend_config_path: missing")


def test_a_backend_file_that_is_not_there() -> None:
    (line,) = problems(WITH_MILVUS)
    assert "semantic_cache.backend_config_path" in line
    assert "milvus.yaml" in line
    assert "No such file or directory" in line


def test_a_configuration_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: cannot be read: No such file or directory$"):
        load("nowhere.yaml")


def test_a_configuration_that_is_a_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        load(folder)


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "just words", "42"])
def test_not_a_mapping(text: str) -> None:
    assert problems(text) == ["config.yaml: must be a mapping of keys to values"]


@pytest.mark.parametrize(
    "text",
    [
        "a: [1, 2",
        "a: 'open",
        "a: b: c",
        "\ta: 1",
        "a: \0",
        "a: !!python/object/apply:os.getcwd []",
        "a: 2024-13-01",  # looks like a date, and is none
        "? [a, b]\n: 1",
        "a: &loop [*loop]",
    ],
)
def test_not_yaml(text: str) -> None:
    (line,) = problems(SMALL + text)
    assert line.startswith("config.yaml: ")


def test_not_text() -> None:
    Path("config.yaml").write_bytes(b"listen: {host: \xff}")
    with pytest.raises(ConfigError, match=r"^config\.yaml: is not UTF-8 text$"):
        load("config.yaml")


def test_all_wrong_values_are_reported_at_once() -> None:
    text = with_value(with_value(with_value(SMALL, "listen.port", 0), "colour", "red"), "models[1].size", "tiny")
    lines = problems(without(text, "policy.default"))
    reported = {line.split(": ")[1] for line in lines}
    assert reported == {"listen.port", "colour", "models[1].size", "policy.default"}


def test_all_wrong_names_are_reported_at_once() -> None:
    text = with_value(with_value(SMALL, "policy.default", "tiny"), "policy.rules[0].model", "huge")
    lines = problems(with_value(text, "models[1].name", "auto"))
    assert [line.split(": ")[1] for line in lines] == ["models[1].name", "policy.rules[0].model", "policy.default"]


def test_one_mistake_is_one_problem() -> None:
    only_one = without(without(SMALL, "models[1]"), "policy.rules")
    lines = problems(with_value(only_one, "models[0].endpoints[0]", "127.0.0.1:8000"))
    assert [line.split(": ")[1] for line in lines] == ["models[0].endpoints[0]"]


def test_a_long_value_is_cut() -> None:
    (line,) = problems(with_value(SMALL, "listen.host", list(range(1000))))
    assert len(line) < 200


# The Milvus file


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("connection.hosts", "a"),
        ("connection.port", 0),
        ("connection.timeout", "soon"),
        ("connection.auth.enabled", "perhaps"),
        ("collection.name", "semantic-cache"),
        ("collection.name", "1st"),
        ("collection.vector_field.name", "my embedding"),
        ("collection.vector_field.dimension", 0),
        ("collection.vector_field.metric_type", "L2"),
        ("collection.index.params.M", "many"),
        ("search.topk", 0),
        ("search.consistency_level", "Sometimes"),
    ],
)
def test_a_milvus_value_that_cannot_be(key: str, value: object) -> None:
    (line,) = milvus_problems(with_value(ARTICLE_MILVUS, key, value))
    assert line.startswith(f"milvus.yaml: {key}: ")
    assert line.endswith(f"(got {value!r})")


def test_the_search_section() -> None:
    milvus = load_milvus(ARTICLE_MILVUS + "search: {params: {ef: 64}, topk: 3, consistency_level: Strong}")
    assert milvus.search.model_dump() == {"params": {"ef": 64}, "topk": 3, "consistency_level": "Strong"}


@pytest.mark.parametrize(
    ("connection", "address", "is_file"),
    [
        ("{host: milvus, port: 19531}", "http://milvus:19531", False),
        ("{host: milvus, tls: {enabled: true}}", "https://milvus:19530", False),
        ("{uri: 'https://cloud.example:443'}", "https://cloud.example:443", False),
        ("{uri: data/cache.db}", "data/cache.db", True),
    ],
)
def test_where_milvus_is(connection: str, address: str, is_file: bool) -> None:
    found = load_milvus(f"connection: {connection}").connection
    assert (found.address, found.is_file) == (address, is_file)


def test_a_milvus_lite_file_ends_in_db() -> None:
    (line,) = milvus_problems("connection: {uri: data/cache}")
    assert line.startswith("milvus.yaml: connection.uri: ")
    assert "'data/cache'" in line


@pytest.mark.parametrize("given", [["cert_file"], ["key_file"], ["cert_file", "ca_file"], ["cert_file", "key_file"]])
def test_tls_files_that_are_not_enough(given: list[str]) -> None:
    Path("there.pem").touch()
    tls = {"enabled": True, **dict.fromkeys(given, "there.pem")}
    (line,) = milvus_problems(with_value(ARTICLE_MILVUS, "connection.tls", tls))
    assert line.startswith("milvus.yaml: connection.tls: ")


@pytest.mark.parametrize("given", [[], ["ca_file"], ["cert_file", "key_file", "ca_file"]])
def test_tls_files_that_are_enough(given: list[str]) -> None:
    Path("there.pem").touch()
    tls = {"enabled": True, **dict.fromkeys(given, "there.pem")}
    assert load_milvus(with_value(ARTICLE_MILVUS, "connection.tls", tls)).connection.tls.enabled


def test_a_tls_file_that_is_not_there() -> None:
    (line,) = milvus_problems("connection: {tls: {enabled: true, ca_file: gone.pem}}")
    assert line == "milvus.yaml: connection.tls: no such file: gone.pem"


def test_tls_files_are_not_looked_for_when_it_is_off() -> None:
    milvus = load_milvus("connection: {tls: {enabled: false, cert_file: gone.pem}}")
    assert milvus.connection.tls.cert_file == "gone.pem"


# What only the weights know


def test_an_unknown_category() -> None:
    config = load_text(SMALL)
    with pytest.raises(ConfigError) as caught:
        check_against(config, ("law", "history"), 384)
    expected = "config.yaml: policy.rules[0].when.category: unknown category (known: law, history) (got 'math')"
    assert str(caught.value) == expected


def test_another_dimension_than_the_embedders() -> None:
    Path("milvus.yaml").write_text(ARTICLE_MILVUS, encoding="utf-8")
    config = load_text(WITH_MILVUS)
    with pytest.raises(ConfigError) as caught:
        check_against(config, LABELS, 768)
    assert str(caught.value).startswith("milvus.yaml: collection.vector_field.dimension: the embedder gives 768")
    assert str(caught.value).endswith("(got 384)")


def test_a_dimension_that_is_left_out_is_the_embedders() -> None:
    Path("milvus.yaml").write_text(without(ARTICLE_MILVUS, "collection.vector_field.dimension"), encoding="utf-8")
    check_against(load_text(WITH_MILVUS), LABELS, 768)


def test_both_are_reported_at_once() -> None:
    Path("milvus.yaml").write_text(ARTICLE_MILVUS, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        check_against(load_text(WITH_MILVUS), ("law", "history"), 768)
    assert len(str(caught.value).splitlines()) == 2


def refused(text: str, *abilities: str) -> list[str]:
    """What is wrong with a configuration when the weights have these abilities."""
    with pytest.raises(ConfigError) as caught:
        check_against(load_text(text), LABELS, 384, abilities)
    return str(caught.value).splitlines()


def test_a_model_s_ability_is_the_one_of_its_name() -> None:
    check_against(load_text(CHEAPEST), LABELS, 384, ("large", "small", "gpt-4o"))


def test_a_model_s_ability_may_have_another_name() -> None:
    config = load_text(with_value(CHEAPEST, "models[1].ability", "gpt-4o"))
    check_against(config, LABELS, 384, ("gpt-4o", "small"))
    assert [model.ability_name for model in config.models] == ["small", "gpt-4o"]


@pytest.mark.parametrize(("abilities", "known"), [(("a", "b"), "a, b"), ((), "none")])
@pytest.mark.parametrize("text", [SMALL, CHEAPEST])
def test_an_unknown_ability(text: str, abilities: tuple[str, ...], known: str) -> None:
    both = with_value(with_value(text, "models[0].ability", "c"), "models[1].ability", "d")
    assert refused(both, *abilities) == [
        f"config.yaml: models[0].ability: unknown ability (known: {known}) (got 'c')",
        f"config.yaml: models[1].ability: unknown ability (known: {known}) (got 'd')",
    ]


@pytest.mark.parametrize(("abilities", "able"), [((), "none"), (("small",), "small"), (("large", "gpt-4o"), "large")])
def test_a_choice_of_fewer_than_two(abilities: tuple[str, ...], able: str) -> None:
    problem = f"needs two models with an ability (there are: {able}) (got 0.05)"
    assert refused(CHEAPEST, *abilities) == [f"config.yaml: policy.rules[0].cheapest_within: {problem}"]


@pytest.mark.parametrize("among", [["small"], ["small", "small"]])
def test_a_choice_among_fewer_than_two(among: list[str]) -> None:
    (line,) = refused(with_value(CHEAPEST, "policy.rules[0].among", among), "small", "large")
    assert line.startswith("config.yaml: policy.rules[0].cheapest_within: needs two models")


def test_a_choice_among_a_model_without_ability() -> None:
    text = with_value(CHEAPEST, "policy.rules[0].among", ["small", "large"])
    problem = "has no ability; name one in models[].ability"
    assert refused(text, "small") == [f"config.yaml: policy.rules[0].among: {problem} (got 'large')"]


def test_the_three_tiers_of_the_documentation() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"(?ms)^```yaml\n(models:\n.*?)^```", text)
    shipped = json.loads((ROOT / "training/shipped/heads/manifest.json").read_bytes())
    config = load_text(example)
    check_against(config, shipped["labels"], 384, [*shipped["abilities"], "large"])
    assert config.policy is not None
    assert [rule.cheapest_within for rule in config.policy.rules] == [None, 0.02, 0.05]


# The environment


def test_a_variable_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST", "vllm.example")
    text = with_value(SMALL, "models[0].endpoints[0]", "http://${VLLM_HOST}:${VLLM_PORT:-8000}/x")
    assert load_text(text).models[0].endpoints == (Endpoint(url="http://vllm.example:8000/x"),)


def test_a_variable_can_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8899")
    assert load_text(SMALL + "listen: {port: '${PORT:-8801}'}").listen.port == 8899


@pytest.mark.parametrize("value", [None, ""])
def test_the_default_stands_for_what_is_unset_or_empty(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """As `:-` does in a shell and in a compose file."""
    monkeypatch.delenv("DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("DATA", value)
    assert load_text(SMALL + "data_dir: ${DATA:-somewhere}").data_dir == Path("somewhere")


def test_a_variable_is_never_read_as_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "a: {b} # 'c")
    milvus = load_milvus("connection: {auth: {enabled: true, username: root, password: '${PASSWORD}'}}")
    assert milvus.connection.auth.password.get_secret_value() == "a: {b} # 'c"


def test_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    (line,) = problems(with_value(SMALL, "models[1].endpoints[1]", "http://${NOT_SET}:8000"))
    assert line.startswith("config.yaml: models[1].endpoints[1]: environment variable NOT_SET is not set")


def test_all_variables_that_are_not_set_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.delenv("NEITHER", raising=False)
    text = with_value(with_value(SMALL, "listen.host", "${NOT_SET}"), "models[0].api_key", "${NEITHER}")
    told = "\n".join(problems(text))
    assert "NOT_SET" in told
    assert "NEITHER" in told


# Secrets


def shown(text: str) -> str:
    """All that is shown of a configuration that loads, or why it does not."""
    try:
        return repr(load_text(text))
    except ConfigError as error:
        return str(error)


def test_secrets_are_there_and_not_shown() -> None:
    Path("milvus.yaml").write_text("connection: {auth: {enabled: true, username: u, password: hunter2}}")
    text = with_value(WITH_MILVUS, "models[0].api_key", "hunter2")
    config = load_text(text)
    assert config.models[0].api_key is not None
    assert config.models[0].api_key.get_secret_value() == "hunter2"
    assert config.milvus.connection.auth.password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(config) + str(config) + config.model_dump_json()


@pytest.mark.parametrize(
    "text",
    [
        with_value(SMALL, "models[0].api_key", ["hunter2"]),
        with_value(SMALL, "models[0].api_key", {"value": "hunter2"}),
        with_value(SMALL, "models[0].apikey", "hunter2"),
        with_value(SMALL, "models[0].endpoints[0]", "ftp://user:hunter2@127.0.0.1"),
        with_value(SMALL, "models[0].endpoints[0]", "http://user:hunter2@127.0.0.1"),
        "models: [{api_key: hunter2, name: small}]\npolicy: {default: small}",
        SMALL.replace("size: small", "size: small\n    api_key: 'hunter2"),
        SMALL.replace("size: small", "size: small\n    api_key: hunter2: x"),
        SMALL.replace("size: small", "size: small\n    api_key: hunter2\n    api_key: hunter2"),
    ],
    ids=[
        "a list",
        "a mapping",
        "misspelt",
        "in a wrong address",
        "in an address",
        "in a model with missing keys",
        "not closed",
        "not YAML",
        "given twice",
    ],
)
def test_a_models_secret_is_never_shown(text: str) -> None:
    assert "hunter2" not in shown(text)


@pytest.mark.parametrize(
    "milvus",
    [
        "connection: {auth: {enabled: true, password: [hunter2]}}",
        "connection: {auth: {enabled: true, passwd: hunter2}}",
        "connection: {auth: [{username: root, password: hunter2}]}",
        "connection: {auth: 'root:hunter2'}",
        "connection: {uri: 'https://root:hunter2@milvus:19530'}",
        "connection: {uri: 'root:hunter2@milvus'}",
        "connection:\n  auth:\n    password: 'hunter2",
    ],
    ids=["a list", "misspelt", "in a list", "not a mapping", "in an address", "in a wrong address", "not closed"],
)
def test_a_milvus_password_is_never_shown(milvus: str) -> None:
    Path("milvus.yaml").write_text(milvus)
    assert "hunter2" not in shown(WITH_MILVUS)


# Policies


def test_several_policies() -> None:
    tree = yaml.safe_load(SMALL)
    tree["policies"] = {"auto-cheap": {"default": "small"}, "auto-best": {"default": "large"}}
    config = load_text(yaml.safe_dump(tree, sort_keys=False))
    assert list(config.aliases) == ["auto", "auto-cheap", "auto-best"]
    assert config.aliases["auto"] is config.policy
    del tree["policy"]
    assert list(load_text(yaml.safe_dump(tree, sort_keys=False)).aliases) == ["auto-cheap", "auto-best"]


def with_policies(**policies: Any) -> str:
    tree = yaml.safe_load(SMALL)
    tree["policies"] = {name.replace("_", "-"): policy for name, policy in policies.items()}
    return yaml.safe_dump(tree)


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ({"auto": {"default": "small"}}, "policies.auto: is given twice: policy is its short form"),
        ({"small": {"default": "small"}}, "models[0].name: is the gateway's own; choose another name (got 'small')"),
        (
            {"auto_cheap": {"default": "huge"}},
            "policies.auto-cheap.default: unknown model (known: small, large) (got 'huge')",
        ),
        ({"auto_cheap": {}}, "policies.auto-cheap.default: missing key"),
        (
            {
                "auto_cheap": {
                    "default": "small",
                    "rules": [{"name": "x", "when": {"alias": ["auto-dear"]}, "model": "small"}],
                }
            },
            "policies.auto-cheap.rules[0].when.alias: unknown alias (known: auto, auto-cheap) (got 'auto-dear')",
        ),
    ],
)
def test_policies_that_cannot_be(policies: dict[str, Any], expected: str) -> None:
    assert problems(with_policies(**policies)) == [f"config.yaml: {expected}"]


RULE = "policy.rules[0]"


def with_rule(rule: dict[str, Any]) -> str:
    return with_value(SMALL, RULE, {"name": "r", **rule})


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"min_confidence": 0.5}, "when: min_confidence goes with category"),
        ({"min_confidence": 0.5, "keywords": ["x"]}, "when: min_confidence goes with category"),
        ({"category": ["math"], "min_confidence": 1.5}, "when.min_confidence: Input should be less than or equal to 1"),
        ({"tenant": ["acme"]}, "when.tenant: unknown tenant (known: none) (got 'acme')"),
        ({"all": [{"not": {"tenant": ["acme"]}}]}, "when.all[0].not.tenant: unknown tenant (known: none) (got 'acme')"),
        ({"any": [{"keywords": ["x"]}, {}]}, "when.any[1]: needs at least one of"),
        ({"not": {}}, "when.not: needs at least one of"),
        ({"negated": {"keywords": ["x"]}}, "when.negated: unknown key"),
        ({"regex": ["(a+)+"]}, "when.regex[0]: may take too long"),
        ({"regex": ["("]}, "when.regex[0]: is not a regular expression"),
        ({"has_tools": "perhaps"}, "when.has_tools: Input should be a valid boolean"),
    ],
)
def test_conditions_that_cannot_be(when: dict[str, Any], expected: str) -> None:
    (line,) = problems(with_rule({"when": when, "model": "large"}))
    assert line.startswith(f"config.yaml: {RULE}.{expected}")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"share": {"model": "huge", "at_most": 0.3}}, "share.model: unknown model (known: small, large) (got 'huge')"),
        (
            {"share": {"model": "small", "at_most": 0.3}},
            "share.model: is the default, too, so that its share has no limit (got 'small')",
        ),
        ({"share": {"model": "large", "at_most": 0}}, "share.at_most: Input should be greater than 0 (got 0)"),
        ({"share": {"model": "large", "at_most": 1}}, "share.at_most: Input should be less than 1 (got 1)"),
        (
            {"share": {"model": "large", "at_most": 0.3, "half_life": 99}},
            "share.half_life: Input should be greater than or equal to 100 (got 99)",
        ),
        ({"share": {"model": "large", "at_most": 0.3}, "model": "large"}, "share: cannot stand beside model"),
        ({"model": "large", "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1 (got 0)"),
        ({"model": "large", "reasoning_effort": "much"}, "reasoning_effort: Input should be 'none', 'minimal'"),
        ({"model": "large", "system_prompt": {}}, "system_prompt: needs one of prepend, replace"),
        (
            {"model": "large", "system_prompt": {"prepend": "a", "replace": "b"}},
            "system_prompt: needs one of prepend, replace",
        ),
        ({"model": "large", "system_prompt": "Be kind."}, "system_prompt: Input should be a valid dictionary"),
        (
            {"model": "large", "chat_template_kwargs": {"x": float("nan")}},
            "chat_template_kwargs: must be what JSON can say",
        ),
        ({"model": "large", "chat_template_kwargs": {"x": 2**70}}, "chat_template_kwargs: must be what JSON can say"),
    ],
)
def test_rules_that_cannot_be(rule: dict[str, Any], expected: str) -> None:
    (line,) = problems(with_rule(rule))
    assert line.startswith(f"config.yaml: {RULE}.{expected}")


def test_two_shares_of_one_model() -> None:
    tree = yaml.safe_load(SMALL)
    share = {"model": "large", "at_most": 0.3}
    tree["policy"]["rules"] = [{"name": "a", "share": share}, {"name": "b", "share": share}]
    expected = "policy.rules[1].share.model: has its share from another rule (got 'large')"
    assert problems(yaml.safe_dump(tree)) == [f"config.yaml: {expected}"]


@pytest.mark.parametrize(
    "rule",
    [
        {"share": {"model": "large", "at_most": 0.3}},
        {"model": "small", "max_tokens": 100},
        {"model": "small", "chat_template_kwargs": {"enable_thinking": False, "x": [1, {"y": None}]}},
    ],
)
def test_rules_that_need_no_condition(rule: dict[str, Any]) -> None:
    config = load_text(with_rule(rule))
    assert config.policy is not None
    assert config.policy.rules[0].name == "r"


def test_a_condition_in_too_many_others_is_refused() -> None:
    nested: dict[str, Any] = {"keywords": ["x"]}
    for _ in range(15):
        nested = {"not": nested}
    assert load_text(with_rule({"when": nested, "model": "large"}))
    (problem,) = problems(with_rule({"when": {"all": [nested]}, "model": "large"}))
    assert "nested more than 16 deep" in problem


def test_merge_keys_cannot_fill_the_memory() -> None:
    levels = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    assert "merges too many values" in problems("\n".join(["a0: &a0 {x: 1, y: 2}", *levels]))[0]


def test_a_condition_nested_without_end_is_refused() -> None:
    nested: dict[str, Any] = {"keywords": ["x"]}
    for _ in range(300):
        nested = {"not": nested}
    assert problems(with_rule({"when": nested, "model": "large"}))


def test_unknown_categories_within_conditions() -> None:
    nested = {"any": [{"category": ["math"]}, {"not": {"category": ["maths"]}}]}
    config = load_text(with_rule({"when": nested, "model": "large"}))
    with pytest.raises(ConfigError) as caught:
        check_against(config, LABELS, 384)
    assert f"config.yaml: {RULE}.when.any[1].not.category: unknown category" in str(caught.value)
    assert "(got 'maths')" in str(caught.value)
