"""A file of YAML that is small, and means a lot."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.checked import MAX_VALUES, ConfigError, read


def doubling(times: int) -> str:
    lines = ["v0: &v0 [1, 2]", *(f"v{i}: &v{i} [*v{i - 1}, *v{i - 1}]" for i in range(1, times))]
    return "\n".join(lines)


def test_what_aliases_stand_for_has_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(doubling(8))
    assert len(str(read(file))) > 1000
    file.write_text(doubling(64))
    with pytest.raises(ConfigError, match=f"config.yaml: holds more than {MAX_VALUES} values$"):
        read(file)
