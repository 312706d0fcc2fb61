"""Named decisions for when a part does not answer: the request goes on without it, and this is counted and logged.

Triton down: rules that need no score, then the default model; no lookup by meaning. Milvus down: a miss. A part that
has just failed is not asked again for a moment, so that requests do not queue behind its time-out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from gateway.metrics import Metrics

log = logging.getLogger("fingerpost")

COOL_DOWN_SECONDS = 2.0


class Breaker:
    """Remembers that a part failed; asks it again after COOL_DOWN_SECONDS."""

    def __init__(self, part: str, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._part = part
        self._metrics = metrics
        self._clock = clock
        self._skip_until: float | None = None  # None: the part works as far as is known

    @property
    def allows(self) -> bool:
        return self._skip_until is None or self._clock() >= self._skip_until

    def worked(self) -> None:
        if self._skip_until is not None:
            log.warning("%s answers again", self._part)
        self._skip_until = None

    def failed(self, error: Exception) -> None:
        if self._skip_until is None:
            log.warning("%s does not answer, going on without it: %s", self._part, error)
        self._skip_until = self._clock() + COOL_DOWN_SECONDS

    def skipped(self) -> None:
        """Count a request that went on without the part."""
        self._metrics.degradations.labels(self._part).inc()
