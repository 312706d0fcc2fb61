"""One of several workers: `python -m gateway.worker NUMBER BOARD`, which `gateway.workers` runs and nobody else.

Its standard input is a socket on which it is sent its configuration, and later on every other one, and says of each
whether it serves in it. It stops on TERM, which may come more than once, and when the socket is closed: nobody would
start another worker in its place. INT and HUP, which a terminal sends to all, are for the process that started it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys

from gateway import metrics
from gateway.generations import Generations
from gateway.lasting import Lasting
from gateway.listening import listening
from gateway.serving import TICK_SECONDS, Server, run
from gateway.siblings import Siblings
from gateway.tally import Together
from gateway.workers import FOLLOWED, STAYED, metrics_folder, received

log = logging.getLogger("fingerpost")


async def work(number: int, board: int) -> None:
    orders, said = await asyncio.open_unix_connection(sock=socket.socket(fileno=sys.stdin.fileno()))
    order = await received(orders)
    if order is None:
        return
    config = order.settings.config
    tallies = Together(board, number, config.listen.workers)
    tallies.place(order.rows)
    lasting = Lasting(metrics.shared(metrics_folder(config), str(number)), tallies)
    lasting.siblings = Siblings(order.meeting, number, config.listen.workers)
    server = Server(Generations(order.settings, lasting), lasting)
    server.handlers = {signal.SIGTERM: server.stop}
    following = asyncio.create_task(_follow(orders, said, server, tallies))
    following.add_done_callback(lambda _: server.stop())
    await server.serve(listening(config.listen))
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following


async def _follow(orders: asyncio.StreamReader, said: asyncio.StreamWriter, server: Server, tallies: Together) -> None:
    """Until the socket is closed. Where a configuration cannot be used the one before stays in force."""
    while not server.started:  # noqa: ASYNC110 (uvicorn has only this flag)
        await asyncio.sleep(TICK_SECONDS)
    said.write(FOLLOWED)
    while (order := await received(orders)) is not None:
        tallies.place(order.rows)
        [error] = await asyncio.gather(server.change(order.settings), return_exceptions=True)
        if error is None:
            log.info("the new configuration is in force")
        else:
            log.error("the new configuration cannot be used, the one before stays in force", exc_info=error)
        said.write(STAYED if error else FOLLOWED)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="gateway.worker", description=__doc__)
    parser.add_argument("number", type=int)
    parser.add_argument("board", type=int, help="file descriptor of the tallies of tenants")
    arguments = parser.parse_args()
    form = f"%(asctime)s %(levelname)s worker {arguments.number}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    run(work(arguments.number, arguments.board))


if __name__ == "__main__":
    main()
