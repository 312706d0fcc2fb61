"""Prometheus metrics, in a registry of their own. No label holds anything a client wrote."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "Metrics"]

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (*_FAST[3:], 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="fingerpost", registry=self.registry)
        histogram = partial(Histogram, namespace="fingerpost", registry=self.registry)
        self.requests = counter("requests", "HTTP requests", ["route", "status"])
        self.cache = counter("cache_outcomes", "Chat requests by what the cache did", ["outcome"])
        self.stores = counter("cache_stores", "Answers by whether Milvus took them", ["outcome"])
        self.routed = counter("routed", "Chat requests sent to a model, by rule", ["rule", "model"])
        self.categories = counter("categories", "Prompts read, by category", ["category"])
        self.degradations = counter("degradations", "Steps left out because a part did not answer", ["part"])
        self.endpoint_errors = counter("endpoint_errors", "Endpoints that could not be reached", ["model", "endpoint"])
        self.tokens = counter("tokens", "Tokens of whole answers generated upstream", ["model", "kind"])
        self.cost = counter("cost", "Price of whole answers generated upstream", ["model"])
        self.saved = counter("saved_cost", "Price of the tokens that hits did not generate again", ["model"])
        self.router_seconds = histogram("router_seconds", "The Triton round trip", buckets=_FAST)
        self.lookup_seconds = histogram("cache_lookup_seconds", "One cache lookup", ["kind"], buckets=_FAST)
        self.first_byte_seconds = histogram(
            "first_byte_seconds", "From request to first byte of the answer", ["outcome"], buckets=_SLOW
        )

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
