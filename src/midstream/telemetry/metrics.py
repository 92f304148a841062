"""Counters, gauges and histograms for Prometheus (needs prometheus-client: ``pip install 'midstream[metrics]'``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from midstream.errors import ConfigurationError
from midstream.observing import (
    BlockBegan,
    BlockEnded,
    FirstToken,
    InterpreterStarted,
    Observation,
    ResultsInjected,
    RowMoved,
    RowsQueued,
    SessionAsked,
    SessionClosed,
    SessionGranted,
    SessionOpened,
    SessionRan,
    Stepped,
    ToolBegan,
    ToolEnded,
    outcome_of,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SLOW = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
_COUNTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of numbers. ``name``: as it is exposed, a counter's ``_total`` included."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = _FAST


METRICS = (
    Metric("midstream_rows", "gauge", "Rows that are not over yet, by the stage that they are in.", ("stage",)),
    Metric("midstream_rows_finished_total", "counter", "Rows that are over, by the kind of their stop.", ("stop",)),
    Metric("midstream_row_seconds", "histogram", "Wall time of a row, waiting for its code included.", (), _SLOW),
    Metric("midstream_row_blocks", "histogram", "Blocks of a row, calls that are written as JSON too.", (), _COUNTS),
    Metric("midstream_tokens_total", "counter", "Ids by origin: prompt, generated or injected.", ("origin",)),
    Metric("midstream_discarded_tokens_total", "counter", "Ids that the engine sampled and that do not count."),
    Metric("midstream_first_token_seconds", "histogram", "From the row's turn to its first ids.", (), _SLOW),
    Metric("midstream_step_seconds", "histogram", "A step of the engine, over all of its rows."),
    Metric("midstream_reward_errors_total", "counter", "Rows whose reward function failed."),
    Metric("midstream_blocks_total", "counter", "Blocks of rows, by kind and outcome.", ("kind", "outcome")),
    Metric("midstream_block_seconds", "histogram", "A block, starting its session included.", ("kind",)),
    Metric("midstream_blocks_running", "gauge", "Blocks that are being run now.", ("kind",)),
    Metric("midstream_tool_calls_total", "counter", "Calls of tools, by tool and outcome.", ("tool", "outcome")),
    Metric("midstream_tool_call_seconds", "histogram", "A call, waiting for its turn included.", ("tool",)),
    Metric("midstream_tool_calls_running", "gauge", "Calls of tools that have no answer yet.", ("tool",)),
    Metric("midstream_tool_calls_cached_total", "counter", "Calls that another call's answer was given to.", ("tool",)),
    Metric("midstream_sessions_open", "gauge", "Sessions of sandbox pools that are open."),
    Metric("midstream_sessions_opened_total", "counter", "Sessions that were opened, copies included."),
    Metric("midstream_sessions_waiting", "gauge", "Who waits for a session, as a pool's max_sessions are open."),
    Metric("midstream_session_wait_seconds", "histogram", "Waiting for a session's place.", (), _SLOW),
    Metric("midstream_sessions_refused_total", "counter", "Waits that ended without a session."),
    Metric("midstream_interpreters_started_total", "counter", "Processes that sessions were given."),
    Metric("midstream_interpreters_replaced_total", "counter", "Those of them that took a dead one's place."),
    Metric("midstream_interpreter_start_seconds", "histogram", "Until a session had its process."),
    Metric("midstream_session_blocks_total", "counter", "Blocks that sessions ran, rows' or not.", ("outcome",)),
    Metric("midstream_session_block_seconds", "histogram", "A block in its session, tool calls included."),
)
"""Every metric that there is."""


class Metrics:
    """An observer that counts for Prometheus.

    Give one object to all generators and pools of a process: ``Generator(..., observers=[metrics])``,
    ``SandboxPool(observers=[metrics])``. ``registry``: where the metrics are registered, by default
    prometheus_client's own, which its ``start_http_server`` exposes.

    Raises :class:`~midstream.errors.ConfigurationError` where prometheus-client is not installed, and for a
    registry that has such metrics already.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise ConfigurationError("Metrics: needs prometheus-client: pip install 'midstream[metrics]'") from error
        self.registry = prometheus_client.REGISTRY if registry is None else registry
        makers: dict[str, Callable[..., Any]] = {
            "counter": prometheus_client.Counter,
            "gauge": prometheus_client.Gauge,
            "histogram": prometheus_client.Histogram,
        }
        self._families: dict[str, Any] = {}
        try:
            for metric in METRICS:
                more = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
                make = makers[metric.kind]
                self._families[metric.name] = make(
                    metric.name, metric.help, metric.labels, registry=self.registry, **more
                )
        except ValueError as error:
            for family in self._families.values():
                self.registry.unregister(family)
            raise ConfigurationError(
                "registry: holds metrics of midstream already; give the same Metrics to all generators and pools, "
                "or a registry of its own to each"
            ) from error
        self._tellers: Mapping[type, Callable[[Any], None]] = {
            RowsQueued: self._rows_queued,
            RowMoved: self._row_moved,
            FirstToken: self._first_token,
            Stepped: self._stepped,
            ResultsInjected: self._results_injected,
            BlockBegan: self._block_began,
            BlockEnded: self._block_ended,
            ToolBegan: self._tool_began,
            ToolEnded: self._tool_ended,
            SessionAsked: self._session_asked,
            SessionGranted: self._session_granted,
            SessionOpened: self._session_opened,
            SessionClosed: self._session_closed,
            InterpreterStarted: self._interpreter_started,
            SessionRan: self._session_ran,
        }

    def __call__(self, observation: Observation) -> None:
        self._tellers[type(observation)](observation)

    def exposition(self) -> tuple[bytes, str]:
        """All metrics of the registry in Prometheus' text format, and its content type, for an HTTP answer."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _of(self, name: str, **labels: str) -> Any:
        family = self._families[f"midstream_{name}"]
        return family.labels(**labels) if labels else family

    # --- rows

    def _rows_queued(self, queued: RowsQueued) -> None:
        self._of("rows", stage="waiting").inc(queued.count)

    def _row_moved(self, moved: RowMoved) -> None:
        self._of("rows", stage=moved.before).dec()
        if moved.after != "done":
            self._of("rows", stage=moved.after).inc()
        if moved.before == "waiting" and moved.after == "decoding":
            self._of("tokens_total", origin="prompt").inc(moved.row.prompt_tokens)
        if moved.after != "done" or moved.trajectory is None:
            return
        trajectory = moved.trajectory
        self._of("rows_finished_total", stop=trajectory.stop.kind.value).inc()
        self._of("row_seconds").observe(trajectory.duration)
        self._of("row_blocks").observe(len(trajectory.calls))
        self._of("discarded_tokens_total").inc(trajectory.discarded)
        if trajectory.reward_error:
            self._of("reward_errors_total").inc()

    def _first_token(self, first: FirstToken) -> None:
        self._of("first_token_seconds").observe(first.seconds)

    def _stepped(self, step: Stepped) -> None:
        self._of("step_seconds").observe(step.seconds)
        self._of("tokens_total", origin="generated").inc(step.tokens)

    def _results_injected(self, injected: ResultsInjected) -> None:
        self._of("tokens_total", origin="injected").inc(injected.tokens)

    # --- blocks and calls

    def _block_began(self, began: BlockBegan) -> None:
        self._of("blocks_running", kind=_kind(began)).inc()

    def _block_ended(self, ended: BlockEnded) -> None:
        kind = _kind(ended.began)
        self._of("blocks_running", kind=kind).dec()
        self._of("blocks_total", kind=kind, outcome=ended.outcome).inc()
        if ended.outcome != "declined":
            self._of("block_seconds", kind=kind).observe(ended.seconds)

    def _tool_began(self, began: ToolBegan) -> None:
        self._of("tool_calls_running", tool=began.name).inc()

    def _tool_ended(self, ended: ToolEnded) -> None:
        name = ended.began.name
        self._of("tool_calls_running", tool=name).dec()
        self._of("tool_calls_total", tool=name, outcome=ended.outcome).inc()
        self._of("tool_call_seconds", tool=name).observe(ended.seconds)
        if ended.answer is not None and ended.answer.cached:
            self._of("tool_calls_cached_total", tool=name).inc()

    # --- sessions

    def _session_asked(self, _: SessionAsked) -> None:
        self._of("sessions_waiting").inc()

    def _session_granted(self, granted: SessionGranted) -> None:
        self._of("sessions_waiting").dec()
        if granted.refused:
            self._of("sessions_refused_total").inc()
        else:
            self._of("session_wait_seconds").observe(granted.seconds)

    def _session_opened(self, _: SessionOpened) -> None:
        self._of("sessions_open").inc()
        self._of("sessions_opened_total").inc()

    def _session_closed(self, _: SessionClosed) -> None:
        self._of("sessions_open").dec()

    def _interpreter_started(self, started: InterpreterStarted) -> None:
        self._of("interpreters_started_total").inc()
        self._of("interpreter_start_seconds").observe(started.seconds)
        if started.replacement:
            self._of("interpreters_replaced_total").inc()

    def _session_ran(self, ran: SessionRan) -> None:
        self._of("session_blocks_total", outcome=outcome_of(ran.result)).inc()
        self._of("session_block_seconds").observe(ran.result.duration)


def _kind(began: BlockBegan) -> str:
    return "code" if began.call.kind == "code" else "tool_call"
