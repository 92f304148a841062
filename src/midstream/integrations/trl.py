"""Rollouts for TRL's ``GRPOTrainer``: its model, our generation.

::

    with Rollouts(tools=[search]) as rollouts:
        trainer = GRPOTrainer(model=..., reward_funcs=..., args=..., train_dataset=..., rollout_func=rollouts)
        trainer.train()

What the trainer is given are the ids that were sampled and injected, never a text that was tokenised again. Injected
ids are masked (``env_mask``), so that no gradient comes from them. TRL's own loop over tools is not used.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from types import TracebackType
from typing import Any, Self

from midstream.engines.base import Engine
from midstream.errors import ConfigurationError, EngineError, MidstreamError
from midstream.generation import Generator
from midstream.integrations.completions import Completion
from midstream.jobs import Reward
from midstream.markup import CODE_TAGS, Markup
from midstream.records import RecordWriter
from midstream.sandbox import SandboxPool
from midstream.types import Limits, Prompt, Sampling, StopKind, Trajectory

EngineOf = Callable[[Any], Engine]
"""Makes an engine of the trainer; its weights are the engine's own affair from then on."""


class Rollouts:
    """A ``rollout_func`` for ``GRPOTrainer``. Close it when training is over, or use it in a ``with`` statement.

    - ``tools``, ``markup``, ``pool``: as :class:`~midstream.Generator` takes them. Without a ``pool`` one is started.
    - ``limits``: bounds of a row; ``max_new_tokens`` is the trainer's ``max_completion_length`` where it is not set.
    - ``max_batch_size``: rows that decode together.
    - ``engine``: makes the engine from the trainer, for generation elsewhere than in the trainer's own model (a vLLM
      engine, say). By default the trainer's model decodes in :class:`~midstream.HuggingFaceEngine`: it always has the
      weights of the step, and each token is marked with the step's number (``weight_version``).
    - ``reward``: what a trajectory is worth, sync or async, as :meth:`~midstream.Generator.generate` takes it. It is
      in the trajectory and in its record; for the trainer give ``reward_funcs=recorded_reward``, which hands it on.
    - ``save_to``: a file that every trajectory is appended to, as ``midstream view`` and ``check`` read it.

    Sampling (temperature, top-k, top-p, min-p) is the trainer's. Reward functions are given, besides the columns of
    the data set, ``trajectory`` (:class:`~midstream.Trajectory`), ``calls`` (how many blocks it ran) and
    ``stop_reason`` of each row. A row that a fault of the sandbox ended keeps no id that is trained on: its whole mask
    is 0. A fault of the engine is raised.

    Logprobs are those of the engine: of the model's own distribution, before temperature and filters. TRL reads them
    only to correct for vLLM's numbers, where they must be of the processed one: then give an ``engine`` that has those.
    """

    __name__ = "midstream_rollouts"  # the trainer logs it

    def __init__(
        self,
        *,
        tools: Mapping[str, Callable[..., Any]] | Iterable[Any] = (),
        markup: Markup | None = CODE_TAGS,
        limits: Limits | None = None,
        pool: SandboxPool | None = None,
        max_batch_size: int = 64,
        engine: EngineOf | None = None,
        reward: Reward | None = None,
        save_to: str | os.PathLike[str] | None = None,
    ) -> None:
        if engine is not None and not callable(engine):
            raise ConfigurationError(f"engine={engine!r}: must be a function that makes an engine of the trainer")
        if reward is not None and not callable(reward):
            raise ConfigurationError(f"reward={reward!r}: must be a function of a trajectory, or None")
        self._tools = tools
        self._markup = markup
        self._limits = limits or Limits()
        self._pool = pool
        self._max_batch_size = max_batch_size
        self._engine_of = engine
        self._reward = reward
        self._stack = ExitStack()
        self._writer = None if save_to is None else self._stack.enter_context(RecordWriter(save_to))
        self._generator: Generator | None = None
        self._model: Any = None
        self._rounds = itertools.count()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the sandboxes, the tools' threads and the file. May be called twice."""
        self._closed = True
        self._generator = self._model = None
        self._stack.close()

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """One completion for each of ``prompts``, which the trainer has repeated for each of its generations.

        Returns lists, one entry a prompt: ``prompt_ids``, ``completion_ids``, ``logprobs`` and ``env_mask`` (lists of
        one length: 1 on sampled ids, 0 on injected ones), ``trajectory``, ``calls``, ``stop_reason``.
        """
        if self._closed:
            raise ConfigurationError("rollout_func: these rollouts are closed")
        if self._engine_of is not None:
            return self._answers(self._generate(prompts, trainer, None))
        import torch
        from trl.models.utils import unwrap_model_for_generation

        arguments = trainer.args
        if trainer.use_vllm:
            raise ConfigurationError(
                "use_vllm=True: the trainer's own model decodes here; set it to False, or give engine="
            )
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=arguments.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
        ):
            training = model.training
            try:
                return self._answers(self._generate(prompts, trainer, model))
            finally:
                model.train(training)

    # --- generation

    def _generate(self, prompts: Sequence[Any], trainer: Any, model: Any) -> list[Trajectory]:
        generator = self._generator_for(trainer, model)
        if model is not None:
            model.eval()
            step = int(trainer.state.global_step)
            # The optimizer has changed the weights in place: nothing is to be done but to say whose they are.
            generator.update_weights(lambda: None, step)
        round_number = next(self._rounds)
        process = int(trainer.accelerator.process_index)
        rows = [
            (_prompt(prompt, f"{process}-{round_number}-{place}", trainer), count)
            for place, (prompt, count) in enumerate(_repeated(prompts))
        ]
        found: dict[str, list[Trajectory]] = {}
        # Prompts with as many samples go together, and their samples share what is computed of the prompt.
        for count in sorted({count for _, count in rows}):
            batch = generator.generate(
                [prompt for prompt, other in rows if other == count], n=count, reward=self._reward
            )
            for trajectory in batch:
                found.setdefault(str(trajectory.prompt.id), []).append(trajectory)
        trajectories = [trajectory for prompt, _ in rows for trajectory in found[str(prompt.id)]]
        for trajectory in trajectories:
            if trajectory.stop.kind is StopKind.ENGINE_FAILURE:
                raise EngineError(trajectory.stop.detail)
            if self._writer is not None:
                self._writer.append(generator.record(trajectory))
        return trajectories

    def _generator_for(self, trainer: Any, model: Any) -> Generator:
        if self._generator is not None and (model is None or model is self._model):
            return self._generator
        if self._generator is not None:
            raise ConfigurationError("rollout_func: another trainer's; make Rollouts for each")
        _check(trainer)
        if self._engine_of is not None:
            engine = self._engine_of(trainer)
        else:
            from midstream.engines.huggingface import HuggingFaceEngine

            engine = HuggingFaceEngine(model, _tokenizer(trainer), max_batch_size=self._max_batch_size)
        limits = self._limits
        if limits.max_new_tokens is None:
            limits = replace(limits, max_new_tokens=int(trainer.max_completion_length))
        self._generator = self._stack.enter_context(
            Generator(
                engine,
                tools=self._tools,
                markup=self._markup,
                limits=limits,
                sampling=_sampling(trainer),
                pool=self._pool,
                seed=int(trainer.args.seed),
            )
        )
        self._model = model
        return self._generator

    # --- what the trainer takes

    def _answers(self, trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
        answers: dict[str, list[Any]] = {
            name: []
            for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "trajectory", "calls", "stop_reason")
        }
        for trajectory in trajectories:
            completion = Completion.of(trajectory, self._filler())
            answers["prompt_ids"].append(list(trajectory.prompt_ids))
            answers["completion_ids"].append(completion.ids)
            answers["logprobs"].append(completion.logprobs)
            answers["env_mask"].append(completion.mask)
            answers["trajectory"].append(trajectory)
            answers["calls"].append(len(trajectory.calls))
            answers["stop_reason"].append(str(trajectory.stop.kind))
        return answers

    def _filler(self) -> int:
        assert self._generator is not None
        return min(self._generator.engine.eos_ids, default=0)


def recorded_reward(trajectory: Sequence[Trajectory], **_columns: Any) -> list[float]:
    """A reward function for the trainer: what ``Rollouts(reward=…)`` found each trajectory to be worth.

    Raises :class:`~midstream.errors.ConfigurationError` where it found nothing, and says why.
    """
    for row in trajectory:
        if row.reward is None:
            reason = row.reward_error or "Rollouts was given none"
            raise ConfigurationError(f"reward: missing for prompt {row.prompt.id!r}: {reason}")
    return [float(row.reward) for row in trajectory if row.reward is not None]


class SandboxFault(BaseException):
    """A sandbox failed, not the code that ran in it; the fault is its ``__cause__``.

    No ``Exception``: those TRL's loop shows to the model as the result of its call, and trains on.
    """


class CodeEnvironment:
    """A stateful interpreter for TRL's own loop over tools: ``GRPOTrainer(environment_factory=factory)``.

    The model calls ``run_python`` as its chat template has it; each rollout has an interpreter of its own, in the
    sandbox. Ids and masks are then TRL's: it renders and tokenises the results itself, runs tools one turn at a time
    for the whole batch, and drops a result that is too long. Where that matters, use :class:`Rollouts`.

    A fault of the sandbox ends training with :class:`SandboxFault`: that loop has no other way to leave a rollout out.

    ``functools.partial(CodeEnvironment, pool)`` is a factory.
    """

    def __init__(self, pool: SandboxPool) -> None:
        self._pool = pool
        self._session: Any = None

    def reset(self, **_row: Any) -> None:
        """A fresh interpreter for the next rollout."""
        self.close()
        self._session = self._pool.session()

    def run_python(self, code: str) -> str:
        """Run Python code. Names, imports and files stay for later calls.

        Args:
            code: The code to run; the value of its last expression is shown.

        Returns:
            What was printed, and the value or the error.
        """
        if not isinstance(code, str):
            raise TypeError(f"code must be a string, not {type(code).__name__}")
        try:
            if self._session is None:
                self._session = self._pool.session()
            return str(self._session.run(code).text)
        except MidstreamError as error:
            raise SandboxFault(str(error)) from error

    def close(self) -> None:
        """End the interpreter."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __del__(self) -> None:
        self.close()


def _repeated(prompts: Sequence[Any]) -> list[tuple[Any, int]]:
    """Each run of equal prompts, once, with how many there are."""
    runs = [list(run) for _, run in groupby(prompts, key=repr)]
    return [(run[0], len(run)) for run in runs]


def _prompt(prompt: Any, name: str, trainer: Any) -> Prompt:
    """A text, or a conversation rendered as the trainer would."""
    if isinstance(prompt, str):
        return Prompt(text=prompt, id=name)
    if not isinstance(prompt, list) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise ConfigurationError(f"prompt={prompt!r}: must be a text, or a conversation as a list of turns")
    for turn in prompt:
        if not isinstance(turn.get("content"), str | None):
            raise ConfigurationError(f"prompt content={turn.get('content')!r}: must be a text; images are not taken")
    answered = prompt[-1].get("role") == "assistant"
    ids = _tokenizer(trainer).apply_chat_template(
        prompt,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=not answered,
        continue_final_message=answered,
        **trainer.chat_template_kwargs,
    )["input_ids"]
    return Prompt(ids=tuple(ids), id=name)


def _tokenizer(trainer: Any) -> Any:
    """The tokenizer itself, where the trainer has a processor around it."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _sampling(trainer: Any) -> Sampling:
    return Sampling(
        temperature=float(trainer.temperature),
        top_k=int(trainer.top_k or 0),
        top_p=float(trainer.top_p),
        min_p=float(trainer.min_p or 0.0),
    )


def _check(trainer: Any) -> None:
    """Refuse what would be ignored otherwise."""
    if trainer.repetition_penalty not in (None, 1.0):
        raise ConfigurationError(
            f"repetition_penalty={trainer.repetition_penalty}: must be 1.0, there is no such sampling here"
        )
    if trainer.args.generation_kwargs:
        raise ConfigurationError(
            f"generation_kwargs={trainer.args.generation_kwargs}: must be empty, they are transformers' own"
        )
    if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
        raise ConfigurationError(
            "tools, environment_factory: the trainer would run its own loop over them; give tools to Rollouts"
        )
