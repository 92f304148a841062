"""Spans for OpenTelemetry (needs opentelemetry-api: ``pip install 'midstream[telemetry]'``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from midstream.errors import ConfigurationError
from midstream.observing import (
    BlockBegan,
    BlockEnded,
    FirstToken,
    Observation,
    ObservedRow,
    RowMoved,
    ToolBegan,
    ToolEnded,
)
from midstream.types import ExecutionError, Trajectory

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, TracerProvider

_STAGES = {"decoding": "decode", "rewarding": "reward"}
"""Stages that are spans; a row that executes has its blocks in their place."""


@dataclass(slots=True)
class _RowSpans:
    """The span of a row, and that of the stage that it is in."""

    row: Span
    stage: Span | None = None


@dataclass(slots=True)
class _Begun:
    """The span of what has begun, and what makes its context the present one no more."""

    span: Span
    token: Any


class Spans:
    """An observer that makes a trace for each row, with spans for what happens in it.

    ``row`` holds ``decode`` (from when the engine may sample to when it must not), ``execute_block`` (``code``
    or a call in JSON, starting its session included), in these ``execute_tool NAME`` for each call, and ``reward``.
    While a block or a tool runs, its span is the current one: spans of a tool's own are below it.

    ``tracer_provider``: by default the process's. ``own_traces``: whether each row is a trace of its own, linked to
    the span that was current when the batch began; otherwise that span is its parent. Prompts, code, arguments and
    values are not in the spans.

    Raises :class:`~midstream.errors.ConfigurationError` where opentelemetry-api is not installed.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None, *, own_traces: bool = True) -> None:
        try:
            from opentelemetry import context, trace
        except ImportError as error:
            raise ConfigurationError("Spans: needs opentelemetry-api: pip install 'midstream[telemetry]'") from error
        self._trace, self._context = trace, context
        self._tracer = trace.get_tracer("midstream", tracer_provider=tracer_provider)
        self._own_traces = own_traces
        self._rows: dict[ObservedRow, _RowSpans] = {}
        self._begun: dict[BlockBegan | ToolBegan, _Begun] = {}

    def __call__(self, observation: Observation) -> None:
        match observation:
            case RowMoved():
                self._move(observation)
            case FirstToken():
                if (spans := self._rows.get(observation.row)) is not None:
                    spans.row.add_event("first token", {"midstream.seconds": observation.seconds})
            case BlockBegan():
                self._begin(
                    observation,
                    "execute_block",
                    {"midstream.block": observation.call.index, "midstream.kind": observation.call.kind},
                )
            case ToolBegan():
                what = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": observation.name}
                self._begin(observation, f"execute_tool {observation.name}", what)
            case BlockEnded():
                error = None if observation.result is None else observation.result.error
                self._end(observation.began, observation.outcome, error, observation.error)
            case ToolEnded():
                error = None if observation.answer is None else observation.answer.error
                self._end(observation.began, observation.outcome, error, observation.error)

    # --- rows

    def _move(self, moved: RowMoved) -> None:
        spans = self._rows.get(moved.row)
        if spans is None:
            spans = self._rows[moved.row] = _RowSpans(self._open_row(moved.row))
        if spans.stage is not None:
            spans.stage.end()
            spans.stage = None
        if moved.after in _STAGES:
            spans.stage = self._tracer.start_span(_STAGES[moved.after], context=self._below(spans.row))
        if moved.after == "done":
            del self._rows[moved.row]
            self._end_row(spans.row, moved.trajectory)

    def _open_row(self, row: ObservedRow) -> Span:
        told: dict[str, Any] = {
            "midstream.prompt_id": row.prompt_id,
            "midstream.group": row.group,
            "midstream.sample": row.sample,
            "midstream.resumed": row.resumed,
        }
        told = {name: value for name, value in told.items() if value is not None}
        if not self._own_traces:
            return self._tracer.start_span("row", attributes=told)
        around = self._trace.get_current_span().get_span_context()
        links = [self._trace.Link(around)] if around.is_valid else []
        return self._tracer.start_span("row", context=self._context.Context(), attributes=told, links=links)

    def _end_row(self, span: Span, trajectory: Trajectory | None) -> None:
        if trajectory is None:
            span.set_attribute("midstream.stop", "abandoned")
        else:
            stop = trajectory.stop
            tokens = {"prompt": len(trajectory.prompt_ids), "generated": 0, "injected": 0}
            for segment in trajectory.segments:
                tokens[segment.origin] += len(segment.ids)
            span.set_attributes(
                {
                    "midstream.stop": stop.kind.value,
                    "midstream.blocks": len(trajectory.calls),
                    **{f"midstream.tokens.{origin}": count for origin, count in tokens.items()},
                }
            )
            if trajectory.reward is not None:
                span.set_attribute("midstream.reward", trajectory.reward)
            if stop.kind.value.endswith("_failure"):
                span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(stop)))
        span.end()

    # --- blocks and calls

    def _begin(self, began: BlockBegan | ToolBegan, name: str, told: Mapping[str, str | int]) -> None:
        span = self._tracer.start_span(name, context=self._around(began), attributes=told)
        self._begun[began] = _Begun(span, self._context.attach(self._trace.set_span_in_context(span)))

    def _around(self, began: BlockBegan | ToolBegan) -> Context | None:
        """What a span is below: the block that runs here, or else the row."""
        spans = None if began.row is None else self._rows.get(began.row)
        if spans is None:
            return None
        current = self._trace.get_current_span().get_span_context()
        if isinstance(began, ToolBegan) and current.trace_id == spans.row.get_span_context().trace_id:
            return None  # the current one
        return self._below(spans.row)

    def _end(
        self,
        began: BlockBegan | ToolBegan,
        outcome: str,
        error: ExecutionError | None,
        failure: BaseException | None,
    ) -> None:
        begun = self._begun.pop(began, None)
        if begun is None:  # its beginning could not be told
            return
        self._context.detach(begun.token)
        begun.span.set_attribute("midstream.outcome", outcome)
        if error is not None:
            begun.span.set_attribute("error.type", error.type)
        elif failure is not None:
            begun.span.set_attribute("error.type", type(failure).__name__)
        if outcome in ("error", "timeout", "limit", "failed"):
            begun.span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, outcome))
        begun.span.end()

    def _below(self, span: Span) -> Context:
        return self._trace.set_span_in_context(span)
