"""Reading files into checked, frozen trees: YAML, environment variables, and errors that name file, key and value."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

MAX_VALUES = 100_000  # of a file; an alias counts as what it stands for


class ConfigError(Exception):
    """The configuration cannot be used; one line per problem, each naming file, key and value."""


class Section(BaseModel):
    """A mapping of the file: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


T = TypeVar("T", bound=Section)


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

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)  # of merge keys, each of which may be many times what it merges
        if len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "merges too many values", node.start_mark)


def read(path: Path, key: str = "") -> dict[str, object]:
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
        self._left = MAX_VALUES
        self.problems: list[str] = []

    def replaced(self, value: object, key: str = "") -> object:
        """`value`, the one of `key`, with the variables in every string below it filled in. Raises `ConfigError`."""
        self._left -= 1
        if self._left < 0:
            raise ConfigError(f"{self._path}: holds more than {MAX_VALUES} values")
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
        problems = [line(path, _key(e["loc"]), e["input"], _reason(e["type"], e["msg"])) for e in causes]
        raise ConfigError("\n".join(problems)) from None


def _inside(location: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _key(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _reason(kind: str, message: str) -> str:
    known = {"missing": "missing key", "extra_forbidden": "unknown key"}
    return known.get(kind, message.removeprefix("Value error, "))


_SECRET = re.compile(
    r"(api_?key|\w*key_sha256|pass\w*|secret\w*|auth\w*|token|credential\w*)(\[\d+\])?$", re.IGNORECASE
)
_CREDENTIALS = re.compile(r"[^\s/'\"]*@")


def line(path: Path, key: str, value: object, problem: str) -> str:
    """`file: key: problem (got value)`; secrets and mappings are not shown, long values cut."""
    where = f"{path}: {key}" if key else str(path)
    if problem == "missing key" or value is None or _holds_mappings(value):
        return f"{where}: {problem}"
    shown = "***" if _SECRET.search(key) else _CREDENTIALS.sub("***@", repr(value))
    return f"{where}: {problem} (got {shown if len(shown) <= 80 else shown[:77] + '...'})"


def _holds_mappings(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and any(map(_holds_mappings, value)))
