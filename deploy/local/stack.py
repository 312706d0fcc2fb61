"""The local stack: `python -m deploy.local.stack serve --config PATH` runs it in the foreground, until told to stop.

`... parts --config PATH` prints which servers it would start, one word a line.

Exit status: 0 when it was asked to stop (INT, TERM), 1 when a part ended by itself, 2 when it could not start.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.local.parts import Part, address, parts
from deploy.local.supervisor import Supervisor
from gateway import config as configuration
from gateway import contract
from gateway.config import Config, ConfigError

WELCOME = """\
ready: {address}

curl {address}/v1/chat/completions \\
  -H 'Content-Type: application/json' \\
  -H 'Authorization: Bearer test-token' \\
  -d '{{"model": "auto", "messages": [{{"role": "system", "content": "You are a helpful assistant."}}, \
{{"role": "user", "content": "What are the main renewable energy sources?"}}], "temperature": 0.7}}'
"""


class CannotStart(Exception):
    """Something that the stack needs is not there; says what, and what to do."""


def check(config: Config, wanted: Sequence[Part]) -> None:
    """Raise `ConfigError` or `CannotStart` for the first thing that would keep the stack from starting."""
    for part in wanted:
        for file, maker in part.needs.items():
            if not file.exists():
                raise CannotStart(f"{file} is missing, which {part.name} needs: `{maker}` makes it")
    found = contract.read(config.triton.model_repository)
    configuration.check_against(config, found.labels, found.dimension, tuple(found.abilities))
    check_ports(wanted)


def check_ports(wanted: Sequence[Part]) -> None:
    """Take every port for a moment, all at once, so that one given twice is found, too."""
    with contextlib.ExitStack() as stack:
        for part in wanted:
            for key, port in part.ports.items():
                family = socket.AF_INET6 if ":" in part.host else socket.AF_INET
                try:
                    stack.enter_context(socket.create_server((part.host, port), family=family))
                except OSError as error:
                    reason = str(error.strerror).partition(" (")[0]
                    where = f"{part.host}:{port}"
                    raise CannotStart(f"{key}: {part.name} cannot listen on {where}: {reason}") from error


@contextlib.contextmanager
def sole_owner(data_dir: Path) -> Iterator[None]:
    """Hold the data folder, which two stacks must not share."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(f"data_dir: {data_dir} is in use by another stack") from None
        yield


def serve(config: Config) -> int:
    wanted = parts(config)
    check(config, wanted)
    with sole_owner(config.data_dir):
        supervisor = Supervisor(wanted, config.data_dir / "logs", WELCOME.format(address=address(config)))
        supervisor.loop()
    return 1 if supervisor.died else 0


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the supervisor takes over: no traceback
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("serve", "parts"))
    parser.add_argument("--config", default="config/config.yaml", metavar="PATH")
    options = parser.parse_args()
    try:
        config = configuration.load(options.config)
        if options.command == "serve":
            return serve(config)
    except (ConfigError, CannotStart) as error:
        print(error, file=sys.stderr)
        return 2
    print(*(part.name for part in parts(config) if part.name != "gateway"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
