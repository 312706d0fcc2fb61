"""What outlives a configuration: figures, remembered answers, what tenants have used, and the dials.

Clients of other servers are not here: each configuration has its own, and they are closed with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from gateway.cache.curves import Curves
from gateway.cache.memory import MemoryCache
from gateway.config import Config, Tenant
from gateway.contract import Contract
from gateway.dial import Dials, keeping
from gateway.feedback import Ledger
from gateway.metrics import Metrics
from gateway.siblings import Siblings
from gateway.tally import Tally
from gateway.tenants import Tenants

LOOSEST_ERROR_RATE = 0.3  # of single entries: what is less sure is not served, whatever was observed


class Lasting:
    def __init__(self, metrics: Metrics, tallies: Callable[[str], Tally]) -> None:
        """`tallies`: what the tenants of these names have used."""
        self.metrics = metrics
        self.ledger = Ledger()
        self.draining = False  # the process has been told to stop
        self.siblings: Siblings | None = None  # of a worker
        self._tallies = tallies
        self._memory: dict[tuple[object, ...], MemoryCache] = {}
        self._dials: dict[str, Dials] = {}  # by the classifier whose complexities they count
        self._curves: dict[tuple[object, ...], Curves] = {}
        self._kept: contextlib.AsyncExitStack = contextlib.AsyncExitStack()

    def tenants(self, configured: tuple[Tenant, ...]) -> Tenants:
        """What they have used so far counts against limits that are new, too."""
        return Tenants(configured, tallies=self._tallies)

    def memory_cache(self, config: Config, contract: Contract) -> MemoryCache:
        """The one there is, as long as it has the same size, eviction and embedder; else an empty one."""
        settings = config.semantic_cache
        kind = (settings.max_entries, settings.eviction_policy, contract.dimension, contract.embedder)
        if kind not in self._memory:
            self._memory = {kind: MemoryCache(settings.max_entries, settings.eviction_policy, contract.dimension)}
        return self._memory[kind]

    def curves(self, config: Config, contract: Contract) -> Curves:
        """Those there are, as long as they decide by the same; those of a shared cache are read from it anew."""
        settings = config.semantic_cache
        threshold = contract.verification.threshold(settings.max_error_rate)
        loosest = contract.verification.threshold(LOOSEST_ERROR_RATE)
        kind = (contract.verifier, settings.max_error_rate, threshold, loosest)
        if kind not in self._curves or settings.backend_type != "memory":
            new = Curves(threshold=threshold, floor=min(loosest, threshold), max_error_rate=settings.max_error_rate)
            self._curves = {kind: new}
        return self._curves[kind]

    async def dials(self, config: Config, contract: Contract) -> Dials:
        """Those there are, with what they know; other ones when the classifier is another one."""
        if contract.classifier not in self._dials:
            await self.close()
            self._dials = {contract.classifier: Dials({}, self.metrics)}
        dials = self._dials[contract.classifier]
        had_any = bool(dials)
        dials.configure(config.aliases)
        if dials and not had_any:
            await self.close()
            folder = config.data_dir / "dials"
            await self._kept.enter_async_context(keeping(dials, folder, contract.classifier, self.metrics))
        return dials

    async def close(self) -> None:
        """Write down what is kept on disk."""
        await self._kept.aclose()
