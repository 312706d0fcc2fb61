"""`python -m gateway --config config/config.yaml`: serve until told to stop."""

from __future__ import annotations

import argparse
import logging
import sys

import uvicorn

from gateway import config as configuration
from gateway import contract
from gateway.app import create_app

GRACE_SECONDS = 3  # for streams that run when the gateway is told to stop


def main() -> int:
    parser = argparse.ArgumentParser(prog="gateway", description=__doc__)
    parser.add_argument("--config", default="config/config.yaml", metavar="PATH")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    arguments = parser.parse_args()
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
        http="httptools",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
