"""An agent loop for verl: its servers sample, midstream runs code and tools in the middle.

::

    class Solver(CodeAgentLoop):
        tools = [search]
        limits = ms.Limits(max_tool_calls=8)

named in the file that ``actor_rollout_ref.rollout.agent.agent_loop_config_path`` leads to. What verl is given are the
ids that its server sampled, and those of results, as they stood in the model's context; ``response_mask`` is 1 on the
first and 0 on the second.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput

from midstream.engines.server.asks import Ask, Finish, Piece
from midstream.engines.server.coroutine import CoroutineEngine, finish_by_ids
from midstream.errors import ConfigurationError, EngineError
from midstream.integrations.completions import Completion
from midstream.integrations.hosting import Host, Hosts, RolloutSettings, sampling_of
from midstream.types import Limits, Prompt, Trajectory
from midstream.vocabulary import Vocabulary

_hosts = Hosts()

AFTER_ABORT = 1.0
"""Seconds until a server that gave a request up, for new weights, is asked again."""


class CodeAgentLoop(RolloutSettings, AgentLoopBase):  # type: ignore[misc]  # it may not be installed
    """Rollouts with code and tools, through verl's own servers. Subclass it to say which tools and limits.

    All rows of a worker process decode side by side, each with a session of its own; code and tools run beside them,
    outside verl's event loop. The prompt is rendered by verl, the answer is one turn. A response has
    ``response_length`` ids at most, results included: those are cut to what is left.

    ``AgentLoopOutput.extra_fields`` has, besides what verl's own loops have, ``stop_reason`` and ``calls`` (how many
    blocks ran). A row that a fault of the sandbox ended keeps no id that is trained on (its mask is 0); a fault of the
    server is raised.

    Sampling is verl's, and noise is its server's own. Images and the like, ``enable_rollout_routing_replay`` and
    ``full_determinism`` are refused.
    """

    async def run(self, sampling_params: dict[str, Any], **columns: Any) -> AgentLoopOutput:
        """One rollout of the row whose ``columns`` these are; ``raw_prompt`` is its conversation.

        Raises :class:`~midstream.errors.ConfigurationError` for what would be ignored, and
        :class:`~midstream.errors.EngineError` where the server failed.
        """
        config = self.rollout_config
        for option in ("enable_rollout_routing_replay", "full_determinism"):
            if config.get(option, False):
                raise ConfigurationError(f"rollout.{option}=True: must be False with {type(self).__name__}")
        wants_logprobs = bool(sampling_params.get("logprobs"))
        sampling = sampling_of(sampling_params, known=frozenset({"logprobs"}))
        messages = [dict(message) for message in columns["raw_prompt"]]
        media = await self.process_multi_modal_info(messages)
        if media:
            raise ConfigurationError(f"raw_prompt: has {', '.join(sorted(media))}; must be text alone")
        ids = tuple(await self.ct_build_initial_tokens(messages))
        host = await self._host(wants_logprobs)
        group = columns.get("uid")
        prompt = Prompt(
            ids=ids,
            group=None if group is None else str(group),
            metadata=_plain(columns),
            limits=_within(self.limits, len(ids) + int(config.response_length)),
        )
        trajectory = await host.rollout(prompt, sampling)
        return await self._output(trajectory, host.filler, wants_logprobs, columns)

    async def score(self, trajectory: Trajectory, columns: Mapping[str, Any]) -> float | None:
        """A rollout's reward, outside the session that ran its code. By default None: verl's own reward is taken."""
        del trajectory, columns
        return None

    async def _output(
        self, trajectory: Trajectory, filler: int, wants_logprobs: bool, columns: Mapping[str, Any]
    ) -> AgentLoopOutput:
        completion = Completion.of(trajectory, filler)
        executing = sum(record.result.duration for record in trajectory.calls if record.result is not None)
        versions = [version for version in trajectory.weight_versions if version >= 0]
        return AgentLoopOutput(
            prompt_ids=list(trajectory.prompt_ids),
            response_ids=completion.ids,
            response_mask=completion.mask,
            response_logprobs=completion.logprobs if wants_logprobs else None,
            reward_score=await self.score(trajectory, columns),
            num_turns=1 + len(trajectory.segments),
            metrics=AgentLoopMetrics(
                generate_sequences=max(0.0, trajectory.duration - executing), tool_calls=executing
            ),
            extra_fields={
                "turn_scores": [],
                "tool_rewards": [],
                "stop_reason": str(trajectory.stop.kind),
                "calls": len(trajectory.calls),
                "min_global_steps": min(versions, default=None),
                "max_global_steps": max(versions, default=None),
            },
        )

    async def _host(self, wants_logprobs: bool) -> Host:
        """The host of all rows of this process that go to this server, from this event loop."""
        loop = asyncio.get_running_loop()
        key = (type(self), id(self.server_manager), id(loop), wants_logprobs)

        def make() -> Host:
            server = _Server(self.server_manager, Vocabulary.of(self.tokenizer), wants_logprobs)
            config = self.rollout_config
            longest = config.get("max_model_len") or int(config.prompt_length) + int(config.response_length)
            processed = str(config.get("logprobs_mode") or "processed").startswith("processed")
            engine = CoroutineEngine(
                server.ask,
                self.tokenizer,
                logprobs=None if not wants_logprobs else "processed" if processed else "raw",
                context_length=int(longest),
                loop=loop,
            )
            host = Host(engine, type(self))
            weakref.finalize(self.server_manager, _hosts.close, key)
            return host

        return await _hosts.get(key, make)


class _Server:
    """verl's client for its servers, as an engine asks it."""

    def __init__(self, client: Any, vocabulary: Vocabulary, logprobs: bool) -> None:
        self._client = weakref.ref(client)
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._name = f"midstream-{id(self):x}"

    async def ask(self, ask: Ask) -> Piece:
        while True:
            client = self._client()
            if client is None:
                raise EngineError("verl's client for its servers is gone")
            output = await client.generate(
                # The name of a row's session with the server that has its prefix cached.
                request_id=f"{self._name}-{ask.row}",
                prompt_ids=list(ask.ids),
                sampling_params=self._parameters(ask),
            )
            ids = tuple(int(token_id) for token_id in output.token_ids)
            aborted = output.stop_reason in ("aborted", "abort")
            if ids or not aborted:
                break
            await asyncio.sleep(AFTER_ABORT)
        if aborted:  # what came stands, and the row goes on behind it
            finish: Finish = "asked"
        elif output.stop_reason == "length":
            finish = "length"
        else:
            finish = finish_by_ids(self._vocabulary, ask, ids)
        logprobs = [0.0] * len(ids) if not self._logprobs else output.log_probs
        if logprobs is None or len(logprobs) != len(ids):
            count = "no" if logprobs is None else len(logprobs)
            raise EngineError(f"verl's server gave {len(ids)} ids and {count} logprobs")
        version = output.extra_fields.get("global_steps")
        return Piece(
            ids, tuple(float(x) for x in logprobs), finish=finish, version=None if version is None else int(version)
        )

    def _parameters(self, ask: Ask) -> dict[str, Any]:
        sampling = ask.sampling
        parameters: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "repetition_penalty": 1.0,
            "logprobs": self._logprobs,
            "max_tokens": ask.most,
            "stop": list(ask.stop_strings),
            "stop_token_ids": list(ask.stop_ids),
            "skip_special_tokens": False,  # stop strings may hold special tokens
        }
        return parameters | ({"min_p": sampling.min_p} if sampling.min_p else {})


def shutdown() -> None:
    """End the sandboxes and threads of this process's agent loops, which otherwise end with it or with their server."""
    _hosts.close()


def _within(limits: Limits, total: int) -> Limits:
    """The limits of a row that may have so many ids, its prompt included."""
    return replace(limits, max_total_tokens=min(total, limits.max_total_tokens or total))


def _plain(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that records and tools can be given: texts, numbers, and lists and mappings of those."""
    plain = {}
    for name, value in columns.items():
        if name == "raw_prompt":
            continue
        found = _plain_value(value)
        if found is not _NOT_PLAIN:
            plain[name] = found
    return plain


_NOT_PLAIN = object()


def _plain_value(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        items = [_plain_value(item) for item in value]
        return _NOT_PLAIN if _NOT_PLAIN in items else items
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        found = {key: _plain_value(item) for key, item in value.items()}
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in found.values()) else found
    return _NOT_PLAIN
