"""Metrics and spans of a run: their options, and the observers."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from midstream.errors import ConfigurationError
from midstream.observing import Observer
from midstream.telemetry import Metrics, Spans


def _address(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, int] | None:
    if value is None:
        return None
    host, colon, port = value.rpartition(":")
    if not port.isdecimal() or int(port) > 65535 or (colon and not host):
        raise click.BadParameter(f"{value!r} must be a port, or HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


METRICS_OPTION = click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    callback=_address,
    help="Serve Prometheus metrics there while it runs; a port alone is this machine's alone (docs/metrics.md).",
)
SPANS_OPTION = click.option(
    "--spans",
    metavar="FILE|otlp",
    type=click.Path(),
    help="Append OpenTelemetry spans to a file, a JSON object a line, or send them as OTEL_EXPORTER_OTLP_* say.",
)


def check_observers(metrics: tuple[str, int] | None, spans: str | None) -> None:
    """Refuse options that need what is not installed. Raises :class:`~midstream.errors.ConfigurationError`."""
    if metrics is not None and importlib.util.find_spec("prometheus_client") is None:
        raise ConfigurationError("--metrics: needs prometheus-client: pip install 'midstream[metrics]'")
    if spans is not None and not _installed("opentelemetry.sdk"):
        raise ConfigurationError("--spans: needs opentelemetry-sdk: pip install 'midstream[telemetry]'")
    if spans == "otlp" and not _installed("opentelemetry.exporter.otlp.proto.http"):
        raise ConfigurationError("--spans otlp: needs its exporter: pip install opentelemetry-exporter-otlp-proto-http")


def start_observers(
    metrics: tuple[str, int] | None, spans: str | None, stack: ExitStack, console: Console
) -> list[Observer]:
    """The observers that the options ask for. What they hold is given back by ``stack``."""
    observers: list[Observer] = []
    if metrics is not None:
        observers.append(_serve_metrics(metrics, stack, console))
    if spans is not None:
        provider = _tracer_provider(spans, stack)
        stack.callback(provider.shutdown)
        observers.append(Spans(provider))
    return observers


def _serve_metrics(address: tuple[str, int], stack: ExitStack, console: Console) -> Metrics:
    from prometheus_client import CollectorRegistry, start_http_server

    metrics = Metrics(CollectorRegistry())
    host, port = address
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise ConfigurationError(f"--metrics {host}:{port}: cannot be served there ({error.strerror})") from error
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    shown = f"[{host}]" if ":" in host else host
    console.print(f"metrics: http://{shown}:{server.server_port}/metrics", soft_wrap=True, markup=False)
    return metrics


def _tracer_provider(spans: str, stack: ExitStack) -> Any:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    exporter: SpanExporter
    if spans == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    else:
        try:
            file = stack.enter_context(Path(spans).open("a", encoding="utf-8"))  # noqa: SIM115  # the stack closes it
        except OSError as error:
            raise ConfigurationError(f"--spans {spans}: cannot be written ({error.strerror})") from error
        exporter = ConsoleSpanExporter(out=file, formatter=lambda span: f"{span.to_json(indent=None)}\n")
    provider = TracerProvider(resource=Resource.create({"service.name": "midstream"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
