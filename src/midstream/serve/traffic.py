"""What is counted of requests, beside what is counted of rows, blocks and sessions."""

from __future__ import annotations

from midstream.serve.service import Service
from midstream.telemetry import Metrics


class Traffic:
    """Registers a service's counts with the metrics of its generator. Needs prometheus-client."""

    def __init__(self, metrics: Metrics, service: Service) -> None:
        from prometheus_client import Counter, Gauge

        self.metrics = metrics
        self._requests = Counter(
            "midstream_requests_total", "Requests by route and status.", ("route", "status"), registry=metrics.registry
        )
        gauges = {
            "midstream_service_rows": ("Answers that are under way or wait.", lambda: service.admission.rows),
            "midstream_service_sessions": ("Sessions that clients named.", lambda: len(service.sessions)),
            "midstream_service_unrecorded_rows": ("Rollouts that could not be recorded.", lambda: service.unrecorded),
        }
        for name, (about, value) in gauges.items():
            Gauge(name, about, registry=metrics.registry).set_function(value)

    def answered(self, route: str, status: int) -> None:
        """A request was answered; a stream, that it began."""
        self._requests.labels(route=route, status=str(status)).inc()
