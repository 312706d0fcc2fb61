"""`python -m gateway --config config/config.yaml` serves until told to stop; `… key` makes an API key.

`… warm FILE` puts answers into the cache of a gateway that runs, `… export FILE` writes them out: `… warm --help`.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from gateway import workers
from gateway.checked import ConfigError
from gateway.listening import CannotStart
from gateway.reload import Settings, Source
from gateway.tenants import digest, new_key

TRANSFERS = ("warm", "export")


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in TRANSFERS:
        from gateway import transfer  # which has a command line of its own

        return transfer.main(sys.argv[1:])
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the configuration has been read for the first time
    parser = argparse.ArgumentParser(prog="gateway", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("serve", "key", *TRANSFERS), default="serve")
    parser.add_argument("--config", default="config/config.yaml", metavar="PATH")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument("--drain-seconds", type=seconds, metavar="SECONDS", help="instead of listen.drain_seconds")
    arguments = parser.parse_args()
    if arguments.command in TRANSFERS:
        parser.error(f"{arguments.command} comes first, and then its own arguments")
    if arguments.command == "key":
        print_key()
        return 0
    source = Source(arguments.config, arguments.drain_seconds)
    try:
        settings = source.read()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.check:
        print(f"{arguments.config}: is fine")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return serve(source, settings)


def serve(source: Source, settings: Settings) -> int:
    """The exit status."""
    try:
        if settings.config.listen.workers > 1:
            return workers.serve(source, settings)
        from gateway import serving  # not small, and of no use to the one that starts workers

        serving.serve(source, settings)
    except CannotStart as error:
        print(f"{source.path}: {error}", file=sys.stderr)
        return 2
    return 0


def seconds(text: str) -> float:
    """Raises `ValueError`, in which argparse names this function."""
    if not 0 <= (number := float(text)) < float("inf"):
        raise ValueError
    return number


def print_key() -> None:
    """The key is nowhere else and cannot be had again; its digest is not secret."""
    key = new_key()
    print(f"key:        {key}\nkey_sha256: {digest(key)}")


if __name__ == "__main__":
    sys.exit(main())
