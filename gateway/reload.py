"""The configuration, read at start and again on HUP.

invalid, or with another value of what is fixed  ──> refused: said in the log, counted; the one before stays
valid, but its clients cannot be made            ──> failed: the same, by all workers where there are several
valid                                            ──> in force for requests from now on
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from gateway import config as configuration
from gateway import contract
from gateway.checked import ConfigError, line
from gateway.config import Config
from gateway.contract import Contract
from gateway.metrics import Metrics

log = logging.getLogger("fingerpost")

Outcome = Literal["applied", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration and the contract that it was checked against."""

    config: Config
    contract: Contract


@dataclass(frozen=True, slots=True)
class Source:
    """Where the configuration comes from: a file, and what the command line says instead of it."""

    path: str
    drain_seconds: float | None = None

    def read(self) -> Settings:
        """Raises `ConfigError`."""
        config = configuration.load(self.path)
        found = contract.read(config.triton.model_repository)
        configuration.check_against(config, found.labels, found.dimension, tuple(found.abilities))
        if self.drain_seconds is not None:
            listen = config.listen.model_copy(update={"drain_seconds": self.drain_seconds})
            config = config.model_copy(update={"listen": listen})
        return Settings(config, found)


def check_fixed(old: Config, new: Config) -> None:
    """Raises `ConfigError` naming each key that takes a restart."""
    problems = [line(new.source, key, value, words) for key, value, words in _fixed(old, new)]
    if problems:
        raise ConfigError("\n".join(problems))


def _fixed(old: Config, new: Config) -> Iterator[tuple[str, object, str]]:
    pairs = {
        "listen.host": (old.listen.host, new.listen.host),
        "listen.port": (old.listen.port, new.listen.port),
        "listen.workers": (old.listen.workers, new.listen.workers),
        "data_dir": (str(old.data_dir), str(new.data_dir)),
    }
    for key, (before, after) in pairs.items():
        if before != after:
            yield key, after, f"takes a restart, the gateway runs with {before}"
    if (old.listen.tls is None) != (new.listen.tls is None):
        yield "listen.tls", None, "takes a restart: the gateway runs with" + ("out" if old.listen.tls is None else "")


class Reloads:
    """Reads the configuration again when asked to, one time after the other."""

    def __init__(
        self, source: Source, settings: Settings, metrics: Metrics, change: Callable[[Settings], Awaitable[None]]
    ) -> None:
        """`change` puts a configuration in force, or raises and changes nothing."""
        self.settings = settings  # in force
        self._source = source
        self._metrics = metrics
        self._change = change
        self._asked = False
        self._task: asyncio.Task[None] | None = None
        self._applied()

    def ask(self) -> None:
        """The handler of HUP."""
        self._asked = True
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)

    async def _run(self) -> None:
        while self._asked:
            self._asked = False
            try:
                settings = await asyncio.to_thread(self._source.read)
                check_fixed(self.settings.config, settings.config)
            except ConfigError as error:
                log.error("the new configuration is refused, the one before stays in force:\n%s", error)
                self._note("refused")
                continue
            await self._change(settings)
            self.settings = settings
            self._applied()
            self._note("applied")
            log.info("the new configuration is in force")

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        if error := task.exception():
            log.error("the new configuration cannot be used, the one before stays in force", exc_info=error)
            self._note("failed")
        if self._asked:  # meanwhile
            self.ask()

    def _applied(self) -> None:
        self._metrics.reloaded.set(1)
        self._metrics.config_seconds.set_to_current_time()

    def _note(self, outcome: Outcome) -> None:
        self._metrics.reloads.labels(outcome).inc()
        self._metrics.reloaded.set(outcome == "applied")
