"""`python -m deploy.local.milvus`: prepare, then become, the local Milvus server.

The real standalone server from the `milvus` wheel, with etcd and storage in the same process and its data below
`--data`. The wheel's own launcher is not used: it kills the server one second after asking it to stop. Asked to stop,
the server takes about three seconds, and its last act, when all is closed, is a harmless panic ("context canceled").

Only etcd keeps to loopback. Milvus itself has no setting for the address it listens on and takes all of them (its
issue 26538), so on a machine that others can reach, use a firewall, or Milvus Lite (`uri: data/cache.db`) instead.
"""

from __future__ import annotations

import argparse
import lzma
import os
import socket
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import milvus

COMPONENTS = ("rootCoord", "proxy", "queryCoord", "queryNode", "indexNode", "dataCoord", "dataNode")
SETTINGS: dict[str, object] = {
    # Standalone has no other node to hand its segments to, so waiting for that (half an hour by default) is in vain.
    "common.gracefulStopTimeout": 1,  # seconds
    # Milvus does not end its sessions in etcd, and the next start waits until the old ones expire: seconds, not 30.
    "common.session.ttl": 10,
    "grpc.client.maxBackoff": 1,  # seconds; with the default of 10 that start takes three times as long
    "grpc.client.maxMaxAttempts": 60,
    # What is not indexed yet, and what never will be for being small, is compared whole: the index that Milvus makes of
    # it in the meantime finds half of a small scope's neighbours (docs/scale.md).
    "queryNode.segcore.interimIndex.enableIndex": "false",
    "etcd_log_path": "stdout",
    "etcd_log_level": "warn",
    "log.level": "warn",
    "log.file.rootPath": '""',  # standard output only
    **{f"{component}.ip": "127.0.0.1" for component in COMPONENTS},  # what they tell each other, not what they bind
}
ETCD = """\
listen-client-urls: {client}
advertise-client-urls: {client}
listen-peer-urls: {peer}
initial-advertise-peer-urls: {peer}
initial-cluster: default={peer}
auto-compaction-mode: revision
auto-compaction-retention: "1000"
quota-backend-bytes: 4294967296
"""
GLOG = "--logtostderr=true\n--minloglevel=1\n"  # 1: warnings


def unpacked() -> Path:
    """The folder with the server and its libraries: 57 MB in the wheel, 250 MB unpacked, once per environment."""
    folder = Path(sys.prefix, f"milvus-{milvus.__version__}")
    if not folder.is_dir():
        packed = sorted(Path(milvus.__file__).parent.glob("data/bin/*.lzma"))
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=sys.prefix) as temporary:
            written = Path(temporary, "bin")
            written.mkdir()
            for file in packed:
                (written / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
                (written / file.stem).chmod(0o755)
            written.rename(folder)
    return folder


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, each a different one, so that two stacks do not meet."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


def configure(data: Path, port: int) -> Path:
    """Write Milvus' configuration below `data`; returns etcd's, which the wheel's template has no key for."""
    config = milvus.MilvusServerConfig(data_dir=str(data))
    config.resolve_storage()
    # Not config.resolve(): while a port lingers after the last run, it would quietly take the next one.
    keys = [key for key in config.configurable_items if key.endswith("_port")]
    *ports, client, peer = free_ports(len(keys) + 2)
    for key, value in {**dict(zip(keys, ports, strict=True)), "proxy_port": port, **SETTINGS}.items():
        config.set(key, value)
    config.write_config()
    (data / "configs/glog.conf").write_text(GLOG)
    etcd = data / "configs/etcd.yaml"
    etcd.write_text(ETCD.format(client=f"http://127.0.0.1:{client}", peer=f"http://127.0.0.1:{peer}"))
    return etcd


def environment(libraries: Path, etcd: Path, metrics_port: int) -> dict[str, str]:
    """Little of the user's own: Milvus reads any variable as a setting, LOG_LEVEL as log.level for one."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TZ") if name in os.environ}
    return {
        **kept,
        "DEPLOY_MODE": "STANDALONE",
        "ETCD_CONFIG_PATH": str(etcd),
        "LD_LIBRARY_PATH": str(libraries),
        "METRICS_PORT": str(metrics_port),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=19530)
    parser.add_argument("--metrics-port", type=int, default=9091)
    parser.add_argument("--data", type=Path, default=Path("data/milvus"))
    options = parser.parse_args()
    data = options.data.absolute()
    folder = unpacked()
    etcd = configure(data, options.port)
    os.chdir(data)  # it looks for configs/ where it is
    # The alias names its lock file, of which a machine otherwise has one for all Milvus servers.
    argv = [str(folder / "milvus"), "run", "standalone", "-alias", str(options.port)]
    os.execve(argv[0], argv, environment(folder, etcd, options.metrics_port))  # noqa: S606 (there is nothing for a shell to do)


if __name__ == "__main__":
    main()
