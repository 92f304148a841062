"""For operators: :class:`Metrics` for Prometheus and :class:`Spans` for OpenTelemetry, which are observers
(:mod:`midstream.observing`), and :class:`JsonFormatter` for logs.

Neither client library is loaded before one of these is made.
"""

from midstream.telemetry.logs import JsonFormatter
from midstream.telemetry.metrics import Metrics
from midstream.telemetry.spans import Spans

__all__ = ["JsonFormatter", "Metrics", "Spans"]
