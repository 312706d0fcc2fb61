"""`python -m gateway --config config/config.yaml`: serve until told to stop. `python -m gateway key`: make an API key."""

from __future__ import annotations

import argparse
import logging
import sys

import uvicorn

from gateway import config as configuration
from gateway import contract
from gateway.app import create_app
from gateway.connection import connections
from gateway.tenants import digest, new_key

GRACE_SECONDS = 3  # for streams that run when the gateway is told to stop


def main() -> int:
    parser = argparse.ArgumentParser(prog="gateway", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("serve", "key"), default="serve")
    parser.add_argument("--config", default="config/config.yaml", metavar="PATH")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    arguments = parser.parse_args()
    if arguments.command == "key":
        print_key()
        return 0
    try:
        config = configuration.load(arguments.config)
        found = contract.read(config.triton.model_repository)
        configuration.check_against(config, found.labels, found.dimension, tuple(found.abilities))
    except configuration.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.check:
        print(f"{arguments.config}: is fine")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    uvicorn.run(
        create_app(config, found),
        host=config.listen.host,
        port=config.listen.port,
        loop="uvloop",
        http=connections(config.listen),  # type: ignore[arg-type]
        ws="none",
        ssl_certfile=config.listen.tls and config.listen.tls.cert_file,
        ssl_keyfile=config.listen.tls and config.listen.tls.key_file,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    return 0


def print_key() -> None:
    """The key is nowhere else and cannot be had again; its digest is not secret."""
    key = new_key()
    print(f"key:        {key}\nkey_sha256: {digest(key)}")


if __name__ == "__main__":
    sys.exit(main())
