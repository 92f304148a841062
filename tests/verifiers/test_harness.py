"""verifiers' own agent over our harness: what its traces hold is what was sampled."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers", reason="verifiers is not installed: make test-verifiers")

import verifiers.v1 as vf
from transformers import AutoTokenizer

import midstream as ms
from midstream.engines.scripted import scripted_logprob
from midstream.integrations import verifiers as integration
from midstream.integrations.verifiers import CodeHarness
from midstream.records import read_records, verify
from tests.rollouts import LONG, Gate
from tests.serving import FakeServer

pytestmark = pytest.mark.slow
MODEL = Path(ms.__file__).parent / "demo"
GATE = Gate()
SAID = {f"Compute {n}.": f" <code>x = {n}</code><code>gate.__name__; x + 1</code> so." for n in range(36, 44)}
SAID |= {"Slow.": "<code>gate()</code> done.", "Long.": "<code>'y' * 300</code>" + "z" * 300, "None.": ""}


def engine_of(**options: Any) -> ms.ScriptedEngine:
    """Says what stands above, behind a system prompt or without."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {f"{system}{question}\nA:": said for question, said in SAID.items() for system in ("", "Be brief. ")}
    return ms.ScriptedEngine(tokenizer, texts, context_length=500, **options)


class Solver(CodeHarness):
    tools = (ms.tool(GATE, name="gate"),)
    sandbox: Mapping[str, Any] = {"preload": []}
    engine: ms.ScriptedEngine

    def make_engine(self, context: Any) -> ms.ScriptedEngine:
        return type(self).engine

    def prompt_of(self, messages: Any) -> ms.Prompt:
        return ms.Prompt(text="".join(message.content for message in messages) + "\nA:")


class OverServer(CodeHarness):
    tokenizer = str(MODEL)
    sandbox: Mapping[str, Any] = {"preload": []}

    def _tokenizer(self) -> Any:
        tokenizer = super()._tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        return tokenizer


class Data(vf.TaskData):
    answer: str = ""


class Computing(vf.Task[Data]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)


@pytest.fixture(autouse=True)
def _plugins() -> Iterator[None]:
    """The harnesses are found by the names of their modules, and leave neither threads nor rows."""
    before = set(threading.enumerate())
    for name, harness in (("solver_harness", Solver), ("server_harness", OverServer)):
        module = types.ModuleType(name)
        module.__all__ = [harness.__name__]  # type: ignore[attr-defined]
        setattr(module, harness.__name__, harness)
        module.__spec__ = types.SimpleNamespace(name=name, parent="", loader=None)  # type: ignore[assignment]
        sys.modules[name] = module
    Solver.engine = engine_of()
    GATE.opened.clear()
    GATE.reached.clear()
    yield
    GATE.opened.set()
    integration.shutdown()
    for name in ("solver_harness", "server_harness"):
        del sys.modules[name]
    assert Solver.engine.open_rows == 0
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("midstream")]


def agent_of(harness: str = "solver_harness", **options: Any) -> vf.Agent:
    config: dict[str, Any] = {
        "harness": {"id": harness},
        "runtime": vf.SubprocessConfig(),
        "model": "scripted",
        "client": vf.EvalClientConfig(base_url="http://127.0.0.1:9/v1", api_key_var="NO_KEY"),
    }
    return vf.Agent(vf.AgentConfig(**(config | options)))


def task(question: str, **data: Any) -> Computing:
    return Computing(Data(prompt=question, **data))


async def test_many_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Solver, "save_to", tmp_path)
    numbers = range(36, 44)
    async with agent_of() as agent:
        traces = await asyncio.gather(
            *(agent.run(task(f"Compute {n}.", answer=str(n + 1), system_prompt="Be brief. ")) for n in numbers)
        )
    integration.shutdown()
    (path,) = tmp_path.iterdir()
    records = {record.trajectory.prompt.id: record for record in read_records(path)}
    assert [violation for record in records.values() for violation in verify(record)] == []
    tokenizer = Solver.engine.tokenizer
    for n, trace in zip(numbers, traces, strict=True):
        assert trace.ok, trace.errors
        trajectory = records[trace.id].trajectory
        (branch,) = trace.branches
        assert [message.role for message in branch.messages] == ["system", "user", "assistant"]
        assert trace.last_reply == f"<code>x = {n}</code><code>gate.__name__; x + 1</code><result>{n + 1}</result> so."
        assert branch.token_ids == trajectory.ids
        assert tokenizer.decode(branch.token_ids).startswith(f"Be brief. Compute {n}.\nA: <code>")
        assert branch.sampled_mask == [bool(bit) for bit in trajectory.mask]
        assert branch.logprobs == trajectory.logprobs
        answer = branch.nodes[-1]
        assert answer.sampled
        assert len(answer.logprobs) == sum(answer.mask) < len(answer.mask)
        seed = ms.engines.base.sample_seed(trajectory.seed, 0)
        assert all(
            value == scripted_logprob(seed, place)
            for place, (value, bit) in enumerate(zip(branch.logprobs, branch.sampled_mask, strict=True))
            if bit
        )
        assert trace.reward == 1.0
        assert trace.num_output_tokens == sum(trajectory.mask)
        assert trace.num_total_tokens == trajectory.total_length
        assert trace.info["midstream"]["calls"][1] == {"code": "gate.__name__; x + 1", "result": str(n + 1)}
        assert not trace.is_truncated
        assert trace.num_turns == 1
        assert vf.WireTrace.model_validate_json(trace.model_dump_json()).id == trace.id
        assert trajectory.prompt.metadata["answer"] == str(n + 1)  # so tools and records are told of the task
    assert len({tuple(records[trace.id].trajectory.logprobs) for trace in traces}) == len(traces)


async def test_no_rollout_waits_for_another() -> None:
    async with agent_of() as agent:
        slow = asyncio.create_task(agent.run(task("Slow.")))
        assert await asyncio.to_thread(GATE.reached.wait, LONG)
        others = await asyncio.gather(*(agent.run(task(f"Compute {n}.")) for n in range(36, 44)))
        assert all(trace.ok for trace in others)
        assert not slow.done()
        GATE.opened.set()
        assert (await slow).last_reply == "<code>gate()</code><result>'through'</result> done."


async def test_a_rollout_whose_time_is_over_is_given_up() -> None:
    async with agent_of(timeout={"rollout": 0.5}) as agent:
        trace = await agent.run(task("Slow."))
        assert trace.is_timeout
        assert trace.stop_condition == "agent_timeout"
    async with agent_of() as agent:
        assert (await agent.run(task("Compute 40."))).ok
    assert Solver.engine.open_rows == 0


async def test_faults_are_the_rollouts_errors_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from midstream.sandbox import Session

    async def fail(session: Session, code: str) -> ms.ExecutionResult:
        raise ms.errors.SandboxError("the machine is out of sandboxes")

    Solver.engine = engine_of(fail={"Compute 41.\nA:": 3})
    async with agent_of() as agent:
        trace = await agent.run(task("Compute 41.", answer="41"))
        assert [error.type for error in trace.errors] == ["ProviderError"]
        monkeypatch.setattr(Session, "run_async", fail)
        unlucky = await agent.run(task("Compute 40.", answer="40"))
        assert [error.type for error in unlucky.errors] == ["SandboxError"]
    for each in (trace, unlucky):
        assert not each.ok
        assert not each.nodes  # nothing to train on
        assert each.reward == 0.0


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"sampling": {"max_tokens": 60}}, 60),
        ({"max_output_tokens": 50}, 50),
        ({"max_output_tokens": 70, "sampling": {"max_tokens": 80}}, 70),
    ],
)
async def test_limits_hold_exactly(options: dict[str, Any], most: int) -> None:
    async with agent_of(**options) as agent:
        trace = await agent.run(task("Long."))
    assert trace.ok
    assert len(trace.nodes[-1].token_ids) == most
    assert trace.is_truncated


async def test_the_agents_total_is_the_rows() -> None:
    async with agent_of(max_total_tokens=90) as agent:
        trace = await agent.run(task("Long."))
    assert len(trace.branches[0].token_ids) == 90
    assert trace.num_total_tokens == 90


async def test_an_empty_answer() -> None:
    async with agent_of() as agent:
        trace = await agent.run(task("None."))
    assert trace.ok
    assert trace.last_reply == ""
    assert sum(trace.nodes[-1].mask) == len(trace.nodes[-1].logprobs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": {"reasoning_effort": "high"}}, "reasoning_effort='high'"),
        ({"sampling": {"presence_penalty": 0.5}}, "presence_penalty=0.5"),
    ],
)
async def test_what_would_be_ignored_is_refused(options: dict[str, Any], message: str) -> None:
    async with agent_of(**options) as agent:
        trace = await agent.run(task("Compute 40."))
    assert not trace.ok
    assert message in trace.errors[0].message


async def test_images_are_refused() -> None:
    picture = vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url="data:,"))
    asked = vf.UserMessage(content=[vf.TextContentPart(text="What is it?"), picture])
    async with agent_of() as agent:
        trace = await agent.run(Computing(Data(prompt=[asked])))
    assert "images" in trace.errors[0].message


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer(ms.Vocabulary.of(AutoTokenizer.from_pretrained(MODEL)), context_length=64)
    yield server
    integration.shutdown()  # its connections come first
    server.close()


async def test_over_a_server(server: FakeServer) -> None:
    """The default engine: a server of vLLM's routes, found by the client's address."""
    client = vf.EvalClientConfig(base_url=f"{server.url}/v1", api_key_var="NO_KEY")
    async with agent_of("server_harness", client=client, model="small") as agent:
        traces = await asyncio.gather(*(agent.run(task("Question?")) for _ in range(4)))
    assert all(trace.ok for trace in traces), traces[0].errors
    for trace in traces:
        (branch,) = trace.branches
        assert 0 < sum(branch.sampled_mask) == len(trace.nodes[-1].logprobs)
        assert len(branch.token_ids) <= 64


async def test_a_harness_without_a_tokenizer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OverServer, "tokenizer", None)
    async with agent_of("server_harness") as agent:
        trace = await agent.run(task("Question?"))
    assert "CodeHarness.tokenizer=None" in trace.errors[0].message


async def test_what_the_harness_cannot_do_verifiers_refuses() -> None:
    class WithServer(Computing):
        @classmethod
        def toolsets(cls, config: Any) -> list[Any]:
            return [object()]

    async with agent_of() as agent:
        with pytest.raises(ValueError, match="cannot host a user"):
            async with agent.interaction(task("Compute 40.")):
                pass
        with pytest.raises(ValueError, match="does not support MCP"):
            await agent.run(WithServer(Data(prompt="Compute 40.")))
