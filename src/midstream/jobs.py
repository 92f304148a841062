"""What a batch is made of before anything is sampled: jobs, and what all of their rows share."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from midstream.deltas import Listener, RowWatch
from midstream.engines.base import Engine, RowRequest
from midstream.errors import ProtocolError
from midstream.markup import Markup
from midstream.observing import BlockEnded, Observation, Observers, ResultsInjected, RowMoved, RowsQueued, Stepped
from midstream.row import Row
from midstream.tools import CallThreads, Tool, ToolHost
from midstream.types import CallRecord, ExecutionResult, Limits, Prompt, Sampling, StopKind, Trajectory
from midstream.vocabulary import Vocabulary


class Session(Protocol):
    """One row's interpreter, as driving needs it (:class:`midstream.sandbox.Session` is one)."""

    async def run_async(self, code: str) -> ExecutionResult: ...
    async def fork_async(self, n: int) -> Sequence[Session]: ...
    def serve(self, call_tool: Any) -> None: ...
    def close(self) -> None: ...


class Report(Protocol):
    """What a pool says of its isolation."""

    @property
    def level(self) -> str: ...


class Pool(Protocol):
    """Where sessions come from, as a generator needs it: :class:`midstream.SandboxPool` is one, and
    :class:`midstream.distributed.ray.RayPool`."""

    @property
    def forkable(self) -> bool: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def report(self) -> Report: ...
    @property
    def free_sessions(self) -> int | None: ...
    async def session_async(self, *, tools: Any, call_tool: Any, seed: int, history: Any) -> Session: ...


@runtime_checkable
class TakesTools(Protocol):
    """A pool whose sandboxes are on other machines, which can have tools beside them."""

    def send_tools(self, tools: tuple[Tool, ...]) -> object: ...


class OwnPool(Pool, Protocol):
    """A pool that a generator has made for itself."""

    def start(self) -> Any: ...
    def close(self) -> None: ...


OpenSession = Callable[[int, Sequence[CallRecord]], Any]
"""Opens a session from a seed and the blocks that it must have run already; awaitable."""

ForkSession = Callable[[Session, int], Coroutine[Any, Any, Sequence[Session]]]
"""Copies an idle session so many times. Raises what :meth:`midstream.sandbox.Session.fork` does."""

Reward = Callable[[Trajectory], Any]
"""A trajectory's reward: a float, or an awaitable of one."""


FAILURES = (StopKind.ENGINE_FAILURE, StopKind.SANDBOX_FAILURE)
"""Ends that are nobody's doing but the machinery's."""


@dataclass(slots=True)
class Progress:
    """Counts of the current batch, for whoever shows them: an observer. Read at any time, from any thread.

    Each of the ``rows`` is in one stage: ``waiting`` for its turn, ``running`` in the engine, ``executing`` (held for
    its code or its calls), ``rewarding``, or ``finished``; how these stopped is in ``stops``. ``failed`` of them
    were failed by engine or sandbox. ``calls``: blocks that were run, and calls that were written as JSON.
    """

    rows: int = 0
    finished: int = 0
    failed: int = 0
    waiting: int = 0
    running: int = 0
    executing: int = 0
    rewarding: int = 0
    generated_tokens: int = 0
    injected_tokens: int = 0
    calls: int = 0
    stops: dict[StopKind, int] = field(default_factory=dict)

    def __call__(self, observation: Observation) -> None:
        match observation:
            case Stepped():
                self.generated_tokens += observation.tokens
            case RowMoved():
                self._move(observation)
            case BlockEnded(result=ExecutionResult()):
                self.calls += observation.outcome != "declined"
            case ResultsInjected():
                self.injected_tokens += observation.tokens
            case RowsQueued():
                self.rows += observation.count
                self.waiting += observation.count

    def _move(self, moved: RowMoved) -> None:
        for stage, change in ((moved.before, -1), (moved.after, 1)):
            match stage:
                case "waiting":
                    self.waiting += change
                case "decoding":
                    self.running += change
                case "executing":
                    self.executing += change
                case "rewarding":
                    self.rewarding += change
        if moved.after == "done" and moved.trajectory is not None:
            kind = moved.trajectory.stop.kind
            self.finished += 1
            self.failed += kind in FAILURES
            self.stops[kind] = self.stops.get(kind, 0) + 1


@dataclass(slots=True, eq=False)
class KeptSession:
    """The interpreter of several rows, one after the other: names and files of one row are there for the next.

    It is kept between two rows for as long as the generator holds sessions (``hold_sessions``). Where it is gone by
    then, or was cut short in a block, it is built again by running the blocks of its ``history``, with the recorded
    tool results. ``seed`` is that of the row that it was made for. A generator's own: not to be given to another.
    """

    seed: int | None = None
    history: list[CallRecord] = field(default_factory=list)
    in_use: bool = False

    def claim(self, seed: int) -> None:
        """Take it for a row. Raises :class:`~midstream.errors.ProtocolError` while another row has it."""
        if self.in_use:
            raise ProtocolError("session: another row is using it; wait until that is over")
        self.in_use = True
        self.seed = seed if self.seed is None else self.seed

    def release(self, calls: Sequence[CallRecord] = ()) -> None:
        """The row is over, and ``calls`` are its blocks."""
        self.history += calls
        self.in_use = False


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to be sampled, or a paused trajectory to go on from. ``index``: its place in the batch.

    Its samples are those from number ``first`` to under ``n``. ``sampling``: in place of the batch's.
    ``listener`` is told of its rows as they come. ``session``: the one in which its row's blocks run, of one row.
    """

    index: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    seed: int
    n: int = 1
    paused: Trajectory | None = None
    first: int = 0
    sampling: Sampling | None = None
    listener: Listener | None = None
    session: KeptSession | None = None

    @property
    def rows(self) -> int:
        return self.n - self.first

    @property
    def spent(self) -> float:
        """Seconds that a resumed row has taken already."""
        return 0.0 if self.paused is None else self.paused.duration


@dataclass(frozen=True, slots=True)
class Settings:
    """What all rows of a batch share.

    ``min_finished`` and ``deadline`` (seconds) pause what is left once so many rows have stopped without a fault
    of the machinery, or so much time has passed.
    """

    markup: Markup | None
    limits: Limits
    sampling: Sampling
    max_open_rows: int | None
    reward: Reward | None
    reward_threads: CallThreads
    open_session: OpenSession
    fork_session: ForkSession
    tools: ToolHost
    observers: Observers
    progress: Progress
    min_finished: int | None = None
    deadline: float | None = None


def jobs_of(
    vocabulary: Vocabulary,
    prompts: Sequence[Prompt | Trajectory],
    n: int,
    seed_of: Callable[[Prompt], int],
    listener: Listener | None = None,
) -> list[Job]:
    """Jobs in the order of the prompts; each prompt is encoded here, so that a bad one is known at once."""
    jobs = []
    for index, item in enumerate(prompts):
        if isinstance(item, Trajectory):
            job = Job(index, item.prompt, item.prompt_ids, item.seed, paused=item, listener=listener)
        else:
            job = Job(index, item, vocabulary.encode_prompt(item), seed_of(item), n, listener=listener)
        jobs.append(job)
    return jobs


def row_of(job: Job, sample: int, settings: Settings, engine: Engine) -> Row:
    """The row of a job's sample, or of its paused trajectory as that was."""
    if job.paused is not None:
        return Row.resume(
            job.paused,
            engine.tokenizer,
            settings.markup,
            settings.limits,
            context_length=engine.context_length,
            eos_ids=engine.eos_ids or None,
        )
    return Row(
        job.prompt,
        engine.tokenizer,
        settings.markup,
        settings.limits,
        prompt_ids=job.prompt_ids,
        context_length=engine.context_length,
        eos_ids=engine.eos_ids or None,
        sample=sample,
        seed=job.seed,
        sampling=job.sampling or settings.sampling,
        logprob_kind=engine.capabilities.logprobs or "raw",
    )


def watch_of(job: Job, row: Row, engine: Engine) -> RowWatch | None:
    """What tells the job's listener of the row, where it has one."""
    if job.listener is None:
        return None
    return RowWatch(job.listener, Vocabulary.of(engine.tokenizer), row, told=row.length > len(job.prompt_ids))


def request_of(job: Job, row: Row, settings: Settings, engine: Engine) -> RowRequest:
    """What the engine is asked for, for ``row`` and further samples of its job."""
    forms = () if settings.markup is None else settings.markup.forms
    # Where calls wait for the end of their turn, nothing is to be done at their end tags.
    end_tags = [form.end for form in forms if form.end is not None and form.turn is None]
    vocabulary = Vocabulary.of(engine.tokenizer)
    closing_ids = {vocabulary.added_id(text) for form in forms for text in form.closing_tokens}
    return RowRequest(
        ids=tuple(row.ids),
        sampling=row.sampling,
        seed=job.seed,
        first_sample=row.sample,
        max_total_tokens=row.max_total_tokens,
        stop_strings=(*end_tags, *row.limits.stop_strings),
        stop_ids=tuple(sorted({*row.limits.stop_ids, *engine.eos_ids, *closing_ids})),
        media=job.prompt.media,
    )
