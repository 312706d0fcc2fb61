"""Reading texts by Triton, each once: the turns of a conversation come again with every turn that follows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cachetools import LRUCache

from gateway.degradation import Breaker
from gateway.metrics import Metrics
from gateway.triton import Reading, Router, TritonUnavailable

KEPT_READINGS = 1024  # of some 4 KB


class Reader:
    """Remembers what was read, by a digest of the text; goes on without Triton while that is down."""

    def __init__(self, router: Router, metrics: Metrics) -> None:
        self._router = router
        self._metrics = metrics
        self._triton = Breaker("triton", metrics)
        self._kept: LRUCache[bytes, Reading] = LRUCache(KEPT_READINGS)

    async def read(self, texts: Iterable[str]) -> dict[str, Reading] | None:
        """The reading of each text, in one round trip; None, counted, when Triton is needed and down."""
        digests = {text: hashlib.sha256(text.encode()).digest() for text in texts}
        readings = {text: self._kept[digest] for text, digest in digests.items() if digest in self._kept}
        missing = [text for text in digests if text not in readings]
        if not missing:
            return readings
        read = await self._ask(missing)
        if read is None:
            return None
        for text, reading in zip(missing, read, strict=True):
            self._kept[digests[text]] = readings[text] = reading
        return readings

    async def _ask(self, texts: list[str]) -> list[Reading] | None:
        if self._triton.allows:
            try:
                with self._metrics.router_seconds.time():
                    read = await self._router.read_all(texts)
            except TritonUnavailable as error:
                self._triton.failed(error)
            else:
                self._triton.worked()
                return read
        self._triton.skipped()
        return None
