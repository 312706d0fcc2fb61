"""The systems there are, by the names that `--systems` takes. One more is one more line."""

from __future__ import annotations

from functools import partial

from bench.cache.gptcache_client import GPTCache
from bench.cache.system import Maker
from bench.cache.threshold import Threshold
from bench.cache.verified import Verified

PLAIN = {f"plain-{threshold:.2f}": threshold for threshold in (0.80, 0.90, 0.95)}
GPTCACHE = "gptcache"
GPTCACHE_COSINE = 0.60  # where its default, 0.8 of a score of 4 - L2², lies for normalised vectors

SYSTEMS: dict[str, Maker] = {
    **{name: partial(Threshold, threshold=threshold) for name, threshold in PLAIN.items()},
    "verified": Verified,
    "verified-5": partial(Verified, max_error_rate=0.05),
    "online": partial(Verified, online=True),
    "online-5": partial(Verified, max_error_rate=0.05, online=True),
    GPTCACHE: GPTCache,
}
