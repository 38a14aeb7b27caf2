# SPDX-License-Identifier: Apache-2.0
"""What Prometheus is told."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalib_flowood.inference.detector import Scores
from anomalib_flowood.serving.scorer import Scorer

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("flowood_requests", "Requests that were answered.", ("path", "status"), registry=own)
        self.seconds = Histogram(
            "flowood_request_seconds",
            "From the head of a request to the end of its answer.",
            ("path",),
            registry=own,
            buckets=_SECONDS,
        )
        self.images = Counter("flowood_images", "Images that were scored.", ("label",), registry=own)
        self.waiting = Gauge("flowood_waiting_images", "Images that are read, wait or are scored.", registry=own)
        self.together = Histogram(
            "flowood_batch_images", "Images that were scored together.", registry=own, buckets=_IMAGES
        )
        self.drift = Gauge(
            "flowood_drift_p_value", "p-value of the last images, together, being like normal ones.", registry=own
        )

    def count(self, scores: Iterable[Scores]) -> None:
        """Count images by their labels."""
        for score in scores:
            self.images.labels(label_of(score) or "none").inc()

    def text(self, scorer: Scorer) -> bytes:
        """All of them as Prometheus reads them; drift is tested now."""
        _, p_value = scorer.drift()
        self.drift.set(math.nan if p_value is None else p_value)
        return generate_latest(self.registry)


def total(counter: Counter) -> int:
    """What a counter has counted, whatever the labels."""
    (family,) = counter.collect()
    return int(sum(sample.value for sample in family.samples if sample.name.endswith("_total")))


def label_of(score: Scores) -> Literal["normal", "anomalous"] | None:
    """What one image is called, ``None`` by a detector without a calibration."""
    if score.label is None:
        return None
    return "anomalous" if score.label[0] else "normal"


class Measured:
    """Middleware that counts requests, and their seconds.

    Args:
        app: What answers.
        metrics: Where they are counted.
        paths: Those that are known; others are counted together.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
