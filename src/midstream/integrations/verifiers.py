"""A harness for verifiers: any task set, with code and tools in the middle of the model's answer.

::

    class Solver(CodeHarness):
        tokenizer = "path/to/model"
        tools = [search]


    __all__ = ["Solver"]

in a top-level module, by whose name verifiers finds it: ``--env.agent.harness.id my_module``. A trace holds the ids
that were sampled and those of results, as they stood in the model's context; the mask is True on the first alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.clients import ModelContext
from verifiers.v1.configs.client import resolve_api_key, resolve_headers

from midstream.engines.base import Engine
from midstream.engines.server import ServerConnection, ServerEngine
from midstream.errors import ConfigurationError, EngineError
from midstream.integrations.completions import Completion
from midstream.integrations.hosting import Host, Hosts, RolloutSettings, sampling_of
from midstream.types import Limits, Message, Prompt, StopKind, Trajectory

_hosts = Hosts()


class CodeHarness(RolloutSettings, vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]  # it may not be installed
    """Answers a task in one turn, in which the model's code runs. Subclass it to say with what.

    - ``tokenizer``: the model's, or a path or name that transformers loads it by.
    - :meth:`make_engine`: where the ids come from; by default a server with vLLM's or SGLang's routes at the
      ``base_url`` of the agent's client.

    All rollouts of a process decode side by side, each with an interpreter of its own in midstream's sandbox: the
    runtime of verifiers runs nothing of the model's. What the harness bypasses is verifiers' endpoint, so response
    interceptors do not see the answer; limits between turns have nothing to bound, as there is one turn.
    ``max_output_tokens`` and ``max_total_tokens`` of the agent, and ``max_tokens`` of its sampling, bound it exactly,
    results included.

    A fault of the sandbox or of the engine is the rollout's error (``SandboxError``, ``ProviderError``); its trace has
    no ids then.
    """

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False  # in the runtime
    NEEDS_CONTAINER = False

    tokenizer: Any = None

    def make_engine(self, context: ModelContext) -> Engine:
        """The engine of a model, made once a process, in a thread beside the event loop."""
        if self.tokenizer is None:
            raise ConfigurationError("CodeHarness.tokenizer=None: must be the model's tokenizer, or a path to it")
        client = context.client
        return ServerEngine(
            client.base_url,
            self._tokenizer(),
            model=context.model,
            connection=ServerConnection(api_key=resolve_api_key(client), headers=resolve_headers(client)),
        )

    def prompt_of(self, messages: Sequence[Message]) -> Prompt:
        """A conversation as the model is given it: by default through its chat template."""
        return Prompt(messages=tuple(messages))

    async def launch(
        self,
        ctx: ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """One rollout, put into ``trace``."""
        del runtime, endpoint, secret, mcp_urls
        parameters = ctx.sampling.model_dump()
        sampling = sampling_of(parameters, known=frozenset({"max_tokens"}))
        messages = self._conversation(data)
        host = await _hosts.get(
            (type(self), ctx.model, ctx.client.model_dump_json()), lambda: Host(self.make_engine(ctx), type(self))
        )
        prompt = replace(
            self.prompt_of([_message(message) for message in messages]),
            id=trace.id,
            group=trace.task.key,
            metadata=data.model_dump(mode="json", exclude={"prompt", "system_prompt"}),
            limits=_within(self.limits, trace.agent.config, parameters.get("max_tokens")),
        )
        began = time.time()
        try:
            trajectory = await host.rollout(prompt, sampling)
        except EngineError as error:
            raise vf.ProviderError(str(error)) from error
        if trajectory.stop.kind is StopKind.SANDBOX_FAILURE:
            raise vf.SandboxError(trajectory.stop.detail)
        span = vf.TimeSpan(start=began, end=time.time())
        _record(trace, messages, trajectory, host, ctx, span)
        return vf.ProgramResult(0, "", "")

    def _conversation(self, data: vf.TaskData) -> list[Any]:
        system, prompt = self.resolve_prompt(data)
        asked = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt or ())
        return asked if system is None else [vf.SystemMessage(content=system), *asked]

    def _tokenizer(self) -> Any:
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer)


def shutdown() -> None:
    """End the sandboxes, engines and threads of this process's harnesses, which otherwise end with it."""
    _hosts.close()


def _message(message: Any) -> Message:
    content = message.content
    if isinstance(content, list):
        if any(part.type != "text" for part in content):
            raise ConfigurationError("task.prompt: has images; must be text alone")
        content = "\n".join(part.text for part in content)
    return Message(role=message.role, content=content or "")


def _within(limits: Limits, agent: Any, max_tokens: int | None) -> Limits:
    """The limits of a row, no wider than the agent's."""

    def least(*bounds: int | None) -> int | None:
        return min((bound for bound in bounds if bound is not None), default=None)

    return replace(
        limits,
        max_new_tokens=least(limits.max_new_tokens, agent.max_output_tokens, max_tokens),
        max_total_tokens=least(limits.max_total_tokens, agent.max_total_tokens),
    )


def _record(
    trace: vf.Trace,
    messages: Sequence[Any],
    trajectory: Trajectory,
    host: Host,
    context: ModelContext,
    span: vf.TimeSpan,
) -> None:
    """Put a trajectory into its trace: the prompt's ids on its last message, then the answer as one message."""
    fit = trajectory.fit_for_training
    completion = Completion.of(trajectory, host.filler)
    prompt_ids = list(trajectory.prompt_ids) if fit else []
    parent = None
    for place, message in enumerate(messages):
        ids = prompt_ids if place == len(messages) - 1 else []
        parent = _add(trace, parent, message, ids, [0] * len(ids), [])
    answer = vf.AssistantMessage(content=host.said(trajectory))
    if fit:
        sampled = [x for x, bit in zip(completion.logprobs, completion.mask, strict=True) if bit]
        node = _add(trace, parent, answer, completion.ids, completion.mask, sampled, sampled=True)
    else:  # as verifiers has answers of which it knows the text alone
        node = _add(trace, parent, answer, [], [], [], sampled=True)
    sampled_count = sum(trajectory.mask)
    trace.calls.append(
        vf.ModelCall(
            node=node,
            model=context.model,
            sampling=context.sampling,
            finish_reason="stop" if trajectory.stop.finished else "length",
            usage=vf.Usage(prompt_tokens=trajectory.total_length - sampled_count, completion_tokens=sampled_count),
            time=span,
        )
    )
    trace.info["midstream"] = _told(trajectory)
    trace.notify()


def _add(
    trace: vf.Trace,
    parent: int | None,
    message: Any,
    ids: Sequence[int],
    mask: Sequence[int],
    logprobs: Sequence[float],
    *,
    sampled: bool = False,
) -> int:
    trace.nodes.append(
        vf.MessageNode(
            parent=parent,
            message=message,
            sampled=sampled,
            token_ids=list(ids),
            mask=[bool(bit) for bit in mask],
            logprobs=list(logprobs),
        )
    )
    return len(trace.nodes) - 1


def _told(trajectory: Trajectory) -> Mapping[str, Any]:
    """What a trace says of the rollout besides its messages: why it stopped, and its blocks with their results."""
    return {
        "stop": str(trajectory.stop),
        "calls": [
            {"code": record.call.code, "result": None if record.result is None else record.result.text}
            for record in trajectory.calls
        ],
    }
