"""`python -m deploy.local.stack serve` on the real servers: how it starts, how it ends, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from pymilvus import DataType, MilvusClient

from tests.conftest import ROOT, Server, Stack, Tree, chat, free_port, merged, models, running, shipped, wait_until

STOP_SECONDS = 10
COLLECTION = "kept"


def write_config(folder: Path, changes: Tree) -> Path:
    """The shipped configuration with `changes`, on ports and in a data folder of its own."""
    ports = [free_port() for _ in range(6)]
    milvus = merged(shipped("cache/milvus.yaml"), {"connection": {"port": ports[0]}})
    local = {
        "triton": {"http_port": ports[1], "metrics_port": ports[2]},
        "milvus": {"metrics_port": ports[3]},
    }
    own = {
        "listen": {"port": ports[4]},
        "data_dir": str(folder / "data"),
        "triton": {"address": f"127.0.0.1:{ports[5]}"},
        "semantic_cache": {"backend_config_path": str(folder / "milvus.yaml")},
        "local": local,
    }
    (folder / "milvus.yaml").write_text(yaml.safe_dump(milvus))
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(merged(shipped(), own), changes)))
    return folder / "config.yaml"


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "deploy.local.stack", "serve", "--config", str(config)]


def processes() -> dict[int, tuple[int, int, str]]:
    """Process -> parent, group and name, zombies left out."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            head, _, tail = stat.read_text().rpartition(")")
            state, parent, group = tail.split()[:3]
            if state != "Z":
                found[int(stat.parent.name)] = (int(parent), int(group), head.partition("(")[2])
    return found


@dataclass(frozen=True)
class Serving:
    process: subprocess.Popen[bytes]
    log: Path

    def family(self) -> dict[int, tuple[int, int, str]]:
        """The supervisor and all that it started, at any depth."""
        every, family = processes(), {self.process.pid}
        while more := {pid for pid, (parent, _, _) in every.items() if parent in family} - family:
            family |= more
        return {pid: every[pid] for pid in family if pid in every}

    def named(self, name: str) -> list[int]:
        return [pid for pid, (_, _, own) in self.family().items() if own == name]

    def wait_for(self, line: str) -> None:
        wait_until(line, lambda: self.process.poll() is not None or line in self.log.read_text(), 180)
        assert line in self.log.read_text(), self.log.read_text()

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Whatever ends it inside the block, it and all that it started is gone within ten seconds."""
        groups = {group for _, group, _ in self.family().values()}
        deadline = time.monotonic() + STOP_SECONDS
        yield
        self.process.wait(STOP_SECONDS)
        while left := {pid: entry for pid, entry in processes().items() if entry[1] in groups}:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@contextlib.contextmanager
def serving(config: Path) -> Iterator[Serving]:
    log = config.with_suffix(".log")
    with running(command(config), log) as process:
        yield Serving(process, log)


def rows(config: Path, *new: int) -> list[int]:
    """The ids that Milvus has, after adding `new`."""
    connection = yaml.safe_load(config.with_name("milvus.yaml").read_text())["connection"]
    client = MilvusClient(f"http://127.0.0.1:{connection['port']}")
    if not client.has_collection(COLLECTION):
        schema = client.create_schema()
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="HNSW", metric_type="IP", params={"M": 8, "efConstruction": 16})
        client.create_collection(COLLECTION, schema=schema, index_params=index)
    client.load_collection(COLLECTION)
    for one in new:
        client.insert(COLLECTION, [{"id": one, "vector": [one, 1.0]}])
    found = client.query(COLLECTION, filter="id >= 0", output_fields=["id"], consistency_level="Strong")
    client.close()
    return sorted(row["id"] for row in found)


def test_data_outlive_a_killed_milvus_a_stop_and_a_killed_supervisor(tmp_path: Path, stub: Server) -> None:
    config = write_config(tmp_path, {"models": models(stub.url)})
    with serving(config) as stack:
        stack.wait_for("ready: http")
        assert rows(config, 1, 2) == [1, 2]
        [milvus] = stack.named("milvus")
        with stack.ending():
            os.kill(milvus, signal.SIGKILL)
        assert stack.process.returncode == 1
        assert f"milvus was killed by SIGKILL; its log is {tmp_path}/data/logs/milvus.log\n" in stack.log.read_text()
    with serving(config) as stack:
        stack.wait_for("ready: http")
        assert rows(config, 3) == [1, 2, 3]
        with stack.ending():
            stack.process.terminate()
        assert stack.process.returncode == 0
        assert "Traceback" not in stack.log.read_text()
    with serving(config) as stack:
        stack.wait_for("milvus is ready")
        assert rows(config) == [1, 2, 3]
        with stack.ending():
            stack.process.kill()


def test_ctrl_c_while_vllm_starts_ends_all(tmp_path: Path) -> None:
    port = free_port()
    changes = {"models": models(f"http://127.0.0.1:{port}"), "local": {"vllm": {"port": port}}}
    with serving(write_config(tmp_path, changes)) as stack:
        wait_until("vLLM's engine", lambda: stack.named("VLLM::EngineCor"), 120)
        with stack.ending():
            os.killpg(stack.process.pid, signal.SIGINT)
        assert stack.process.returncode == 0
        assert "Traceback" not in stack.log.read_text()


def test_a_part_that_cannot_start_ends_the_rest(tmp_path: Path, stub: Server) -> None:
    repository = tmp_path / "model_repository"
    for file in (ROOT / "model_repository").rglob("*.*"):
        copy = repository / file.relative_to(ROOT / "model_repository")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"not a network" if file.suffix == ".onnx" else file.read_bytes())
    config = write_config(tmp_path, {"models": models(stub.url), "triton": {"model_repository": str(repository)}})
    with serving(config) as stack:
        wait_until("the end", lambda: stack.process.poll() is not None, 60)
        assert stack.process.returncode == 1
        assert "triton ended with exit status 1; its log is" in stack.log.read_text()


def test_nobody_finds_a_prompt_in_the_logs(stack: Stack) -> None:
    assert chat(stack.url, "Is a quokka a rodent?", max_tokens=8).status_code == 200
    logs = sorted(Path(stack.config_tree["data_dir"], "logs").glob("*.log"))
    assert [log.stem for log in logs] == ["gateway", "milvus", "triton", "vllm"]
    assert not [log for log in logs if b"quokka" in log.read_bytes()]


def test_it_says_where_it_is_and_what_to_paste(stack: Stack) -> None:
    shown = stack.log.read_text()
    assert all(f"{part} is ready after" in shown for part in ("triton", "milvus", "vllm", "gateway"))
    pasted = shown[shown.index("\ncurl ") :].replace("test-token", "a-tenant-of-this-test")
    answer = subprocess.run(["bash", "-c", pasted], capture_output=True, check=True, timeout=120).stdout
    assert b'"choices"' in answer


@pytest.mark.parametrize("key", ["listen.port", "triton.address", "connection.port", "local.milvus.metrics_port"])
def test_a_taken_port_is_named(tmp_path: Path, stub: Server, key: str) -> None:
    """The stub's port is taken, also for a server that wants it on all addresses."""
    port = int(stub.url.rpartition(":")[2])
    changes: dict[str, Tree] = {
        "listen.port": {"listen": {"port": port}},
        "triton.address": {"triton": {"address": f"localhost:{port}"}},
        "connection.port": {},
        "local.milvus.metrics_port": {"local": {"milvus": {"metrics_port": port}}},
    }
    config = write_config(tmp_path, changes[key])
    if key == "connection.port":
        milvus = tmp_path / "milvus.yaml"
        milvus.write_text(yaml.safe_dump(merged(yaml.safe_load(milvus.read_text()), {"connection": {"port": port}})))
    line = refusal(config)
    assert line.startswith(f"{key}: ")
    assert f":{port}: Address already in use" in line


def test_a_port_given_twice_is_named(tmp_path: Path) -> None:
    port = free_port()
    line = refusal(write_config(tmp_path, {"listen": {"port": port}, "local": {"triton": {"http_port": port}}}))
    assert line == f"listen.port: gateway cannot listen on 127.0.0.1:{port}: Address already in use"


def test_missing_weights_are_named(tmp_path: Path) -> None:
    line = refusal(write_config(tmp_path, {"triton": {"model_repository": str(tmp_path)}}))
    maker = f"`make train ARGS='--out {tmp_path}'` makes it"
    assert line == f"{tmp_path}/embedder/weights/model.onnx is missing, which triton needs: {maker}"


def test_a_wrong_configuration_is_named(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"local": {"redis": {"port": 6379}}})
    assert refusal(config) == f"{config}: local.redis: unknown key"


def test_a_data_folder_serves_one_stack(tmp_path: Path, stack: Stack) -> None:
    data = stack.config_tree["data_dir"]
    assert f"data_dir: {data} is in use" in refusal(write_config(tmp_path, {"data_dir": data}))


def refusal(config: Path) -> str:
    """The one line with which `serve` refuses to start anything."""
    result = subprocess.run(command(config), cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (2, "")
    assert not (config.parent / "data/logs").exists()
    [line] = result.stderr.splitlines()
    return line
