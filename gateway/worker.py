"""One of several workers: `python -m gateway.worker NUMBER BOARD`, which `gateway.workers` runs and nobody else.

Its standard input is a pipe on which it is sent its configuration, and later on every other one. It stops on TERM,
which may come more than once, and when the pipe ends: nobody would start another worker in its place. INT and HUP,
which a terminal sends to all, are for the process that started it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys

from gateway import metrics
from gateway.generations import Generations
from gateway.lasting import Lasting
from gateway.listening import listening
from gateway.serving import Server, run
from gateway.siblings import Siblings
from gateway.tally import Together
from gateway.workers import metrics_folder, received

log = logging.getLogger("fingerpost")


async def work(number: int, board: int) -> None:
    orders = await _standard_input()
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
    following = asyncio.create_task(_follow(orders, server, tallies))
    following.add_done_callback(lambda _: server.stop())
    await server.serve(listening(config.listen))
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _follow(orders: asyncio.StreamReader, server: Server, tallies: Together) -> None:
    """Until the pipe ends. What cannot be followed ends the worker: another one may begin with it."""
    while (order := await received(orders)) is not None:
        tallies.place(order.rows)
        await server.change(order.settings)
        log.info("the new configuration is in force")


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
