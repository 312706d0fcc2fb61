"""Prometheus metrics, in a registry of their own. No label holds anything a client wrote.

Of several processes each writes its figures into files of one folder, and whichever is asked shows those of all:
counters and histograms are added up, and of each gauge it says here whether its values are added up, averaged or the
highest taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "Metrics", "forget", "shared"]

Combine = Callable[[Iterable[float]], float]

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (*_FAST[3:], 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: of the files of several processes, see `shared`."""
        self.registry = CollectorRegistry()
        self._folder = folder
        self._combine: dict[str, Combine] = {}  # by gauge
        self._of_parts: list[Gauge] = []
        counter = partial(Counter, namespace="fingerpost", registry=self.registry)
        histogram = partial(Histogram, namespace="fingerpost", registry=self.registry)
        total, mean, highest = (partial(self._gauge, combine) for combine in (math.fsum, fmean, max))
        self.workers = total("workers", "Processes that serve")
        self.tasks = total("tasks", "Tasks of the event loops")
        self.restarts = counter("worker_restarts", "Workers started again because they had ended")
        self.reloads = counter("config_reloads", "Times that the configuration was read again", ["outcome"])
        self.reloaded = highest("config_last_reload_successful", "Whether the last time is in force")
        self.config_seconds = highest("config_seconds", "When the configuration in force was read, since the epoch")
        self.requests = counter("requests", "HTTP requests", ["route", "status"])
        self.ended = counter("connections_ended", "Connections that the gateway ended, by reason", ["reason"])
        self.tenant_requests = counter(
            "tenant_requests", "Requests by tenant, admitted or why they were not let in", ["tenant", "outcome"]
        )
        self.tenant_tokens = counter("tenant_tokens", "Tokens generated upstream for a tenant", ["tenant"])
        self.cache = counter("cache_outcomes", "Requests for an answer by what the cache did", ["outcome"])
        self.stores = counter("cache_stores", "Answers by whether Milvus took them", ["outcome"])
        self.verified = counter("cache_verified", "Lookups that were verified, by what came of it", ["outcome"])
        self.checks = counter("cache_checks", "Answers compared with the model's, by what came of it", ["outcome"])
        self.hit_error = highest("cache_error_rate", "Estimated share of wrong answers among hits by meaning")
        self.hit_error_low = highest("cache_error_rate_low", "Lower end of its 95 % interval")
        self.hit_error_high = highest("cache_error_rate_high", "Upper end of its 95 % interval")
        self.hit_threshold = highest("cache_threshold", "Score (log-odds) from which an answer is served")
        self.routed = counter("routed", "Requests sent to a model, by rule", ["rule", "model"])
        self.categories = counter("categories", "Prompts read, by category", ["category"])
        self.degradations = counter("degradations", "Steps left out because a part did not answer", ["part"])
        endpoint = ["model", "endpoint"]
        self.endpoint_errors = counter("endpoint_errors", "Requests that an endpoint failed", [*endpoint, "reason"])
        self.ejections = counter("endpoint_ejections", "Times that an endpoint was ejected", endpoint)
        self.health_checks = counter("health_checks", "Health checks by what came of them", ["endpoint", "outcome"])
        self.retries = counter("retries", "Requests sent once more, to this model", ["model"])
        self.fallbacks = counter("fallbacks", "Answers of another model than the chosen one", ["model", "fallback"])
        self.endpoint_state = total(
            "endpoint_state", "Workers that see an endpoint in this state", [*endpoint, "state"]
        )
        self.outstanding = total("endpoint_outstanding", "Requests that an endpoint is answering", endpoint)
        self.error_rate = mean("endpoint_error_rate", "Share of requests that fail, of late", endpoint)
        self.endpoint_seconds = mean("endpoint_first_byte_seconds", "Until an answer begins", [*endpoint, "kind"])
        self.dial_bar = mean("dial_bar", "Complexity from which on a rule with a share holds", ["alias", "rule"])
        self.dial_share = mean("dial_share", "Share that such a rule's model was given of late", ["alias", "rule"])
        self.tokens = counter("tokens", "Tokens of whole answers generated upstream", ["model", "kind"])
        self.cost = counter("cost", "Price of whole answers generated upstream", ["model"])
        self.saved = counter("saved_cost", "Price of the tokens that hits did not generate again", ["model"])
        self.texts = counter("texts", "Texts of batches that Triton answered", ["route"])
        self.feedback = counter("feedback", "Verdicts on answers", ["verdict"])
        self.feedback_rows = counter("feedback_rows", "Verdicts to be recorded, by whether they were", ["outcome"])
        self.router_seconds = histogram("router_seconds", "The Triton round trip", buckets=_FAST)
        self.lookup_seconds = histogram("cache_lookup_seconds", "One cache lookup", ["kind"], buckets=_FAST)
        self.verifier_seconds = histogram("verifier_seconds", "The Triton round trip of a verification", buckets=_FAST)
        self.first_byte_seconds = histogram(
            "first_byte_seconds", "From request to first byte of the answer", ["outcome"], buckets=_SLOW
        )

    def exposition(self) -> bytes:
        collector = _collector(self._folder) if self._folder else self.registry
        return generate_latest(_Combined(collector, self._combine))

    def clear_parts(self) -> None:
        """Show nothing of endpoints and dials until it is set again: some may not be there any more."""
        for gauge in self._of_parts:
            for metric in gauge.collect():
                for sample in metric.samples:
                    gauge.labels(**sample.labels).set(math.nan)

    def _gauge(self, combine: Combine, name: str, words: str, labels: Iterable[str] = ()) -> Gauge:
        gauge = Gauge(name, words, labels, namespace="fingerpost", registry=self.registry, multiprocess_mode="liveall")
        self._combine[f"fingerpost_{name}"] = combine
        if labels:
            self._of_parts.append(gauge)
        return gauge


class _Combined:
    """What a collector has, with one value for each gauge and its labels; a gauge that is not a number is left out."""

    def __init__(self, collector: Collector, combine: dict[str, Combine]) -> None:
        self._collector = collector
        self._combine = combine

    def collect(self) -> Iterator[Metric]:
        for metric in self._collector.collect():
            if metric.type == "gauge" and metric.name in self._combine:
                yield _combined(metric, self._combine[metric.name])
            else:
                yield metric


def _combined(metric: Metric, combine: Combine) -> Metric:
    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for sample in metric.samples:
        if not math.isnan(sample.value):
            labels = tuple((name, value) for name, value in sample.labels.items() if name != "pid")
            found.setdefault(labels, []).append(sample.value)
    combined = Metric(metric.name, metric.documentation, metric.type)
    for labels, each in found.items():
        combined.add_sample(metric.name, dict(labels), combine(each))
    return combined


def _collector(folder: Path) -> Collector:
    """Of the figures of all processes in a folder."""
    return MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]


def shared(folder: Path, process: str) -> Metrics:
    """Those of one process among several. Who takes the name of a process that has ended goes on with its counts."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]
    return Metrics(folder)


def forget(folder: Path, process: str) -> None:
    """Of a process that has ended leave out what is only true of one that runs: its gauges."""
    mark_process_dead(process, str(folder))  # type: ignore[no-untyped-call]
