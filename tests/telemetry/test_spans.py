"""A trace for each row: what spans there are, what is below what, and what they say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from midstream import HERMES_TOOL_CALLS, Limits, SandboxPool, Trajectory
from midstream.telemetry import Spans
from tests.rollouts import rollouts

CODE = "a <code>x = look(4)</code> b <code>1/0</code> c"


class Exported:
    """The spans of a provider of its own."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def trees(self) -> list[tuple[str, list[Any]]]:
        """The spans of each trace as nested pairs of a name and what is below it, in the order of their starts."""
        spans = sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        return [_tree(span, spans) for span in spans if span.parent is None]

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


def _tree(span: ReadableSpan, spans: Sequence[ReadableSpan]) -> tuple[str, list[Any]]:
    below = [one for one in spans if one.parent is not None and one.parent.span_id == span.context.span_id]
    assert all((one.start_time or 0) >= (span.start_time or 0) for one in below)
    return span.name, [_tree(one, spans) for one in below]


def test_a_trace_for_each_row(sandboxes: SandboxPool) -> None:
    exported = Exported()
    tracer = exported.provider.get_tracer("tests")

    def look(number: int) -> int:
        with tracer.start_as_current_span("inside the tool"):
            return number

    observer = Spans(exported.provider)
    batch = rollouts({"p": CODE, "q": "plain"}, sandboxes, n=2, tools=[look], observers=[observer],
                     reward=lambda t: 0.5)  # fmt: skip
    with_code = (
        "row",
        [
            ("decode", []),
            ("execute_block", [("execute_tool look", [("inside the tool", [])])]),
            ("decode", []),
            ("execute_block", []),
            ("decode", []),
            ("reward", []),
        ],
    )
    plain = ("row", [("decode", []), ("reward", [])])
    assert sorted(exported.trees(), key=str) == sorted([with_code, with_code, plain, plain], key=str)
    assert len({span.context.trace_id for span in exported.exporter.get_finished_spans()}) == 4
    rows = {(s.attributes["midstream.prompt_id"], s.attributes["midstream.sample"]): s for s in exported.named("row")}
    for trajectory in batch:
        told = rows[trajectory.prompt.id, trajectory.sample].attributes
        assert told is not None
        assert told["midstream.stop"] == "end_of_sequence"
        assert told["midstream.tokens.generated"] == sum(trajectory.mask)
        assert told["midstream.tokens.prompt"] == len(trajectory.prompt_ids)
        assert told["midstream.reward"] == 0.5
    assert [event.name for event in rows["p", 0].events] == ["first token"]
    blocks = [(s.attributes["midstream.outcome"], s.status.status_code) for s in exported.named("execute_block")]
    assert sorted(blocks, key=str) == sorted(
        [("ok", trace.StatusCode.UNSET), ("error", trace.StatusCode.ERROR)] * 2, key=str
    )
    assert not observer._rows
    assert not observer._begun


def test_calls_side_by_side_are_below_their_own_blocks(sandboxes: SandboxPool) -> None:
    exported = Exported()

    def one() -> int:
        return 1

    def two() -> int:
        return 2

    calls = "".join(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in ("one", "two"))
    rollouts({"p": calls}, sandboxes, tools=[one, two], markup=HERMES_TOOL_CALLS, name="qwen",
             observers=[Spans(exported.provider)],
             limits=Limits(max_tool_calls=2, at_tool_call_limit="stop"))  # fmt: skip
    ((_, below),) = exported.trees()
    blocks = [span for span in below if span[0] == "execute_block"]
    assert sorted(blocks) == [
        ("execute_block", [("execute_tool one", [])]),
        ("execute_block", [("execute_tool two", [])]),
    ]


@pytest.mark.parametrize("own_traces", [True, False])
def test_the_span_around_a_batch(sandboxes: SandboxPool, own_traces: bool) -> None:
    exported = Exported()
    with exported.provider.get_tracer("tests").start_as_current_span("training step") as around:
        rollouts({"p": CODE}, sandboxes, tools={"look": abs},
                 observers=[Spans(exported.provider, own_traces=own_traces)])  # fmt: skip
    (row,) = exported.named("row")
    context = around.get_span_context()
    if own_traces:
        assert row.parent is None
        assert [link.context.span_id for link in row.links] == [context.span_id]
    else:
        assert row.parent is not None
        assert (row.parent.span_id, row.context.trace_id) == (context.span_id, context.trace_id)
    (tool,) = exported.named("execute_tool look")
    assert tool.parent is not None
    assert tool.parent.span_id in {span.context.span_id for span in exported.named("execute_block")}


def test_a_row_that_fails(sandboxes: SandboxPool) -> None:
    exported = Exported()
    batch = rollouts({"p": "plain and more of it"}, sandboxes, engine={"fail": {"p": 1}},
                     observers=[Spans(exported.provider)])  # fmt: skip
    assert isinstance(batch[0], Trajectory)
    (row,) = exported.named("row")
    assert row.attributes is not None
    assert row.attributes["midstream.stop"] == "engine_failure"
    assert row.status.status_code is trace.StatusCode.ERROR


def test_without_the_client_it_says_what_to_install() -> None:
    program = (
        "import sys\nsys.modules['opentelemetry'] = None\n"
        "from midstream import errors\nfrom midstream.telemetry import Spans\n"
        "try:\n    Spans()\nexcept errors.ConfigurationError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.stdout == "Spans: needs opentelemetry-api: pip install 'midstream[telemetry]'\n", done.stderr
