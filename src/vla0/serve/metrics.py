"""Counters of the server, for Prometheus."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Counts the requests, errors, clients, batches and latencies of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        shared = {"registry": self.registry, "namespace": "vla0"}
        self.requests = Counter("requests", "observations answered", **shared)
        self.errors = Counter("errors", "messages answered with an error", **shared)
        self.clients = Gauge("clients", "connections now", **shared)
        self.batches = Histogram(
            "batch_size",
            "observations decoded together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            **shared,
        )
        self.latency = Histogram(
            "latency_seconds",
            "from an observation's arrival to its answer",
            buckets=SECONDS,
            **shared,
        )
        self.busy = 0  # requests that have begun and are not answered yet

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count and time a request that ends without an error."""
        started, self.busy = time.monotonic(), self.busy + 1
        try:
            yield
            self.requests.inc()
            self.latency.observe(time.monotonic() - started)
        finally:
            self.busy -= 1

    def page(self) -> tuple[bytes, str]:
        """Return the page for Prometheus, as (text, content type)."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
