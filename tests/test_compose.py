"""docker-compose.yml cannot be run here, so all that can be known of it without an engine is checked."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from gateway import config as configuration
from gateway.config import Config
from tests.conftest import ROOT

Tree = dict[str, Any]

COMPOSE = ROOT / "docker-compose.yml"
FILES = (COMPOSE, ROOT / "deploy/docker/gpu.yml")
GATEWAY_CONFIG = "deploy/docker/config.yaml"
DOCKERFILES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
# What a user must set.
SET = {"TRITON_IMAGE": "tritonserver:26.08-py3"}
VARIABLE = re.compile(r"\$\{(\w+)(:[-?])?([^}]*)\}")
# Ports that the images listen on, which no file of ours sets.
LISTENING = {"triton": 8001, "milvus": 19530, "etcd": 2379, "minio": 9000, "vllm": 8000}


def text(path: Path) -> str:
    """The file as Compose reads it: variables replaced by what is set, else by their defaults."""
    return VARIABLE.sub(lambda m: SET[m[1]] if m[2] == ":?" else m[3], path.read_text())


def tree(path: Path) -> Tree:
    loaded = yaml.safe_load(text(path))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def services() -> dict[str, Tree]:
    found = tree(COMPOSE)["services"]
    assert isinstance(found, dict)
    return found


@pytest.fixture
def config(services: dict[str, Tree], monkeypatch: pytest.MonkeyPatch) -> Config:
    """What the gateway's container reads, with no more in the environment than Compose puts there."""
    monkeypatch.chdir(ROOT)
    for name in VARIABLE.findall(COMPOSE.read_text()):
        monkeypatch.delenv(name[0], raising=False)
    for name, value in services["gateway"]["environment"].items():
        monkeypatch.setenv(name, value)
    return configuration.load(GATEWAY_CONFIG)


def names(service: str, settings: Tree) -> set[str]:
    """What other containers can call a service."""
    networks = settings.get("networks", {})
    aliases = networks["default"].get("aliases", []) if isinstance(networks, dict) and "default" in networks else []
    return {service, *aliases}


def instructions(dockerfile: Path, word: str) -> list[list[str]]:
    return [line.split()[1:] for line in dockerfile.read_text().splitlines() if line.startswith(f"{word} ")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_compose_specification(path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "options",
    [[], ["--profile", "vllm"], ["--profile", "vllm-cpu"], [f"--file={path}" for path in FILES]],
    ids=["plain", "vllm", "vllm-cpu", "gpu"],
)
def test_docker_compose_accepts_it(options: list[str]) -> None:
    if not _compose_is_installed():
        pytest.skip("docker compose is not installed")
    done = _docker_compose([*options, "config", "--quiet"], SET)
    assert done.returncode == 0, done.stderr


def test_docker_compose_names_the_variable_that_is_missing() -> None:
    if not _compose_is_installed():
        pytest.skip("docker compose is not installed")
    done = _docker_compose(["config", "--quiet"], {})
    assert done.returncode != 0
    assert "TRITON_IMAGE" in done.stderr
    assert "docs/containers.md" in done.stderr


def _docker_compose(arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "DOCKER_CONFIG")}
    command = ["docker", "compose", "--env-file", "/dev/null", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, **variables}, capture_output=True, text=True, check=False
    )


def _compose_is_installed() -> bool:
    try:
        return _docker_compose(["version"], {}).returncode == 0
    except FileNotFoundError:
        return False


def test_every_variable_has_a_default_or_says_what_is_missing() -> None:
    for path in FILES:
        content = path.read_text()
        assert len(VARIABLE.findall(content)) == content.count("$"), f"{path.name}: a $ that is not a ${{NAME:…}}"
        for name, operator, rest in VARIABLE.findall(content):
            assert operator, f"{name} has no default"
            assert operator == ":-" or (name in SET and "docs/containers.md" in rest), f"{name}: {rest}"


def test_every_variable_is_documented_with_its_default() -> None:
    page = (ROOT / "docs/containers.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", page, re.MULTILINE))
    used = {name: default for path in FILES for name, _, default in VARIABLE.findall(path.read_text())}
    assert rows.keys() == used.keys()
    for name, default in used.items():
        expected = "required" if name in SET else f"`{default}`" if default else "empty"
        assert rows[name] == expected, name


def test_the_gateway_gets_the_variables_its_configuration_asks_for(services: dict[str, Tree]) -> None:
    asked = {name for name, _, _ in VARIABLE.findall((ROOT / GATEWAY_CONFIG).read_text())}
    assert asked == services["gateway"]["environment"].keys()


def test_what_is_mounted_or_built_from_is_there(services: dict[str, Tree]) -> None:
    volumes = tree(COMPOSE)["volumes"]
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in volumes, mount
        if build := service.get("build"):
            assert ROOT / build["dockerfile"] in DOCKERFILES


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_is_there_and_not_ignored(dockerfile: Path) -> None:
    ignore = Path(f"{dockerfile}.dockerignore").read_text().splitlines()
    assert "*" in ignore
    kept = {path for line in ignore if line.startswith("!") for path in ROOT.glob(line[1:])}
    copied = [source for words in instructions(dockerfile, "COPY") if "--from" not in words[0] for source in words[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source) in kept, source


def test_the_gateway_finds_its_files_where_they_are_mounted(services: dict[str, Tree], config: Config) -> None:
    dockerfile = ROOT / services["gateway"]["build"]["dockerfile"]
    home = Path(instructions(dockerfile, "WORKDIR")[-1][0])
    assert f'CMD ["--config", "{GATEWAY_CONFIG}"]' in dockerfile.read_text()
    for path in (GATEWAY_CONFIG, config.semantic_cache.backend_config_path, config.triton.model_repository):
        assert f"./{path}:{home / str(path)}:ro" in services["gateway"]["volumes"]


def test_triton_serves_the_same_model_repository(services: dict[str, Tree], config: Config) -> None:
    assert services["triton"]["volumes"] == [f"./{config.triton.model_repository}:/models:ro"]
    for path in FILES:
        assert "--model-repository=/models" in tree(path)["services"]["triton"]["command"]


def test_same_configuration_as_the_local_stack_with_other_addresses(config: Config) -> None:
    local = configuration.load("config/config.yaml")
    assert config.policy == local.policy
    assert config.upstream == local.upstream
    assert _without_addresses(config) == _without_addresses(local)


def _without_addresses(config: Config) -> Tree:
    plain = config.model_dump(
        exclude={"local": True, "data_dir": True, "listen": {"host", "allow_anonymous"}, "triton": {"address"}}
    )
    plain["models"] = [model.model_dump(exclude={"endpoints", "api_key"}) for model in config.models]
    del plain["semantic_cache"]["backend_config_path"]
    return plain | {"milvus": config.milvus.model_dump(exclude={"connection": {"host"}})}


def test_the_configuration_names_hosts_and_ports_of_services(services: dict[str, Tree], config: Config) -> None:
    known = {name: service for service, settings in services.items() for name in names(service, settings)}
    milvus = config.milvus.connection
    addresses = {config.triton.address, f"{milvus.host}:{milvus.port}"}
    addresses |= {urlsplit(endpoint.url).netloc for model in config.models for endpoint in model.endpoints}
    addresses |= {services["milvus"]["environment"][name] for name in ("ETCD_ENDPOINTS", "MINIO_ADDRESS")}
    for address in addresses:
        host, _, port = address.partition(":")
        assert host in known
        assert int(port) == LISTENING[host]


def test_vllm_serves_the_models_that_the_gateway_asks_for(services: dict[str, Tree], config: Config) -> None:
    served = [model.name for model in config.models]
    for service in ("vllm", "vllm-cpu"):
        command = services[service]["command"]
        start = command.index("--served-model-name") + 1
        assert command[start : start + len(served)] == served
        assert int(command[command.index("--max-model-len") + 1]) == config.models[0].context_window
        key = config.models[0].api_key
        assert key is not None
        assert services[service]["environment"]["VLLM_API_KEY"] == key.get_secret_value()


def test_milvus_and_its_object_store_have_the_same_credentials(services: dict[str, Tree]) -> None:
    milvus, store = services["milvus"]["environment"], services["minio"]["environment"]
    assert milvus["MINIO_ACCESS_KEY_ID"] == store["MINIO_ROOT_USER"]
    assert milvus["MINIO_SECRET_ACCESS_KEY"] == store["MINIO_ROOT_PASSWORD"]


def test_images_are_pinned_and_name_no_registry(services: dict[str, Tree]) -> None:
    images = [service["image"] for service in services.values() if "image" in service]
    images += [words[0] for path in DOCKERFILES for words in instructions(path, "FROM") if "$" not in words[0]]
    assert len(images) >= 6
    for image in images:
        name, _, tag = image.partition(":")
        assert tag not in ("", "latest"), image
        assert "." not in name.split("/")[0], image


def test_every_service_is_watched_and_restarted(services: dict[str, Tree]) -> None:
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] == "service_healthy"
            # What a profile starts may be absent, anything else may not.
            assert wanted.get("required", True) is ("profiles" not in services[other]), f"{name} on {other}"


def test_only_the_gateway_is_published_and_only_on_this_machine(services: dict[str, Tree], config: Config) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"gateway": [f"127.0.0.1:{config.listen.port}:{config.listen.port}"]}
    assert config.listen.host == "0.0.0.0"  # noqa: S104 (of the container)
    assert config.listen.allow_anonymous
    assert f"127.0.0.1:{config.listen.port}/health" in services["gateway"]["healthcheck"]["test"][-1]


def test_a_gpu_is_asked_for_only_on_request(services: dict[str, Tree]) -> None:
    assert [name for name, service in services.items() if "deploy" in service] == ["vllm"]
    assert services["vllm"]["profiles"] == ["vllm"]
    assert tree(FILES[1])["services"]["triton"]["deploy"] == services["vllm"]["deploy"]


@pytest.mark.parametrize("name", ["triton-requirements.txt", "triton-requirements-gpu.txt"])
def test_tritons_image_has_what_the_models_import(name: str) -> None:
    installed = {package.removesuffix("-gpu") for package in requirements(ROOT / "deploy/docker" / name)}
    programs = sorted((ROOT / "model_repository").glob("*/1/model.py"))
    assert programs
    for program in programs:
        assert imported(program) - sys.stdlib_module_names - {"triton_python_backend_utils"} <= installed, program


def test_tritons_image_has_the_versions_of_the_local_stack() -> None:
    image = requirements(ROOT / "deploy/docker/triton-requirements.txt")
    local = requirements(ROOT / "deploy/local/triton-requirements.txt")
    assert {name: image[name] for name in ("onnxruntime", "tokenizers")}.items() <= local.items()


def requirements(path: Path) -> dict[str, str]:
    """Package -> version specifier."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    matches = [re.fullmatch(r"([\w.-]+?)((?:==|<|>=).+)?", line) for line in lines if line]
    return {match[1]: match[2] or "" for match in matches if match}


def imported(program: Path) -> set[str]:
    """The top-level modules that a program imports."""
    nodes = list(ast.walk(ast.parse(program.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {module.split(".")[0] for module in modules}
