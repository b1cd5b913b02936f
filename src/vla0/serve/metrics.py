"""What the server counts, for Prometheus."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Requests, errors, clients, batches and latencies of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "vla0"}
        self.requests = Counter("requests", "observations answered", **own)
        self.errors = Counter("errors", "messages answered with an error", **own)
        self.clients = Gauge("clients", "connections now", **own)
        self.batches = Histogram(
            "batch_size", "observations decoded together", buckets=(1, 2, 4, 8, 16, 32, 64), **own
        )
        self.latency = Histogram(
            "latency_seconds", "from an observation's arrival to its answer", buckets=SECONDS, **own
        )
        self.busy = 0  # requests begun and not answered

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts and times one, where it ends well."""
        started, self.busy = time.monotonic(), self.busy + 1
        try:
            yield
            self.requests.inc()
            self.latency.observe(time.monotonic() - started)
        finally:
            self.busy -= 1

    def page(self) -> tuple[bytes, str]:
        """(text, content type)."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
