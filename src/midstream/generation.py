"""Batches of rows over an engine and a pool of sandboxes: the public face of midstream."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import count
from types import TracebackType
from typing import Any, Self

from midstream import checks
from midstream.batch import TrajectoryBatch
from midstream.control import Control, ForkRequest, RowName
from midstream.delivery import RowIndex
from midstream.deltas import Delta, Listener, deltas_of
from midstream.driving import Drive
from midstream.engines.base import Engine, prompt_seed, sample_seed
from midstream.errors import CapabilityError, ConfigurationError, ProtocolError
from midstream.jobs import (
    Job,
    KeptSession,
    OwnPool,
    Pool,
    Progress,
    Reward,
    Settings,
    jobs_of,
    row_of,
)
from midstream.leases import SessionLeases
from midstream.markup import CODE_TAGS, Markup
from midstream.observing import Observer, Observers
from midstream.prompting import PromptLike, as_prompt, named_prompts
from midstream.records import Record
from midstream.sessions import Sessions
from midstream.submitting import Inbox, Submissions
from midstream.tools import CallThreads, Tool, ToolHost, ToolSet
from midstream.types import Limits, Prompt, Sampling, StopKind, Trajectory
from midstream.vocabulary import Vocabulary

_MOST_REWARDS = 16
"""Rewards of sync functions that are computed at a time."""


class Generator:
    """Generates with code and tools, on any engine.

    - ``tools``: functions that the model may call, sync or async; a mapping gives them other names, and
      :func:`midstream.tool` more options. They run in this process, outside the sandbox. What tells the model
      of them is the caller's to put into prompts: ``ToolSet(tools).describe()``.
    - ``markup``: how blocks and results look; None runs no code at all.
    - ``limits``, ``sampling``: of every row; a prompt's own limits go before ``limits``.
    - ``pool``: a :class:`~midstream.sandbox.SandboxPool` of the caller's (left open), or another
      :class:`~midstream.jobs.Pool`; by default one is started with the generator and stopped with it.
    - ``seed``: keys sampling noise and the sandboxes' random numbers, together with each prompt's id.
    - ``max_open_rows``: rows that are given to the engine at a time; None leaves the queueing to the engine.
    - ``observers``: callables that are told what happens (:mod:`midstream.observing`), such as
      :class:`midstream.telemetry.Metrics`; of the pool too that the generator starts.
    - ``hold_sessions``: seconds for which the session of a paused row is kept for it. A row that is gone on with
      later, elsewhere, or was paused while its code ran, has its session built again from its blocks.

    Use as a context manager, or call ``close``. The engine is the caller's and is left as it is.

    Raises :class:`~midstream.errors.ConfigurationError` for options that cannot work, and
    :class:`~midstream.errors.CapabilityError` for sampling that the engine cannot do.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tools: Mapping[str, Callable[..., Any]] | Iterable[Tool | Callable[..., Any]] = (),
        markup: Markup | None = CODE_TAGS,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        pool: Pool | None = None,
        seed: int = 0,
        max_open_rows: int | None = None,
        hold_sessions: float = 0.0,
        observers: Iterable[Observer] = (),
    ) -> None:
        checks.instance("markup", markup, Markup, optional=True)
        checks.instance("limits", limits, Limits, optional=True)
        checks.instance("sampling", sampling, Sampling, optional=True)
        if pool is not None and not callable(getattr(pool, "session_async", None)):
            raise ConfigurationError(f"pool={pool!r}: must be a SandboxPool, another Pool, or None")
        self.engine = engine
        self.markup = markup
        self.limits = limits or Limits()
        self.sampling = sampling or Sampling()
        self.seed = checks.integer("seed", seed)
        wanted = "must be a number of seconds, 0 or more"
        hold_sessions = checks.number("hold_sessions", hold_sessions, lambda value: value >= 0, wanted)
        _check_sampling(engine, self.sampling)
        self._max_open_rows = checks.integer("max_open_rows", max_open_rows, 1, optional=True)
        self._vocabulary = Vocabulary.of(engine.tokenizer)
        self._observers = checks.items("observers", observers, "callables")
        self._tools = ToolHost(ToolSet(tools), observers=Observers(self._observers))
        self._reward_threads = CallThreads(_MOST_REWARDS, "midstream-reward")
        self._control = Control()
        self._leases = SessionLeases(hold_sessions)
        self._sessions = Sessions(pool, self._make_pool, self._leases, self._tools)
        self._submissions = Submissions(self._submitted)
        self._unnamed = count()
        self._closed = False
        self.progress = Progress()
        self.interrupted: TrajectoryBatch | None = None
        """What was done when the last batch was ended by Ctrl-C: finished rows, and the others cancelled (of
        ``generate_async``, which its task's cancellation ends, the finished rows alone)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the tools' threads and the pool that the generator started. May be called twice.

        A batch that another thread is generating ends soon, its unfinished rows cancelled.
        """
        self._closed = True
        self._control.end(StopKind.CANCELLED)
        self._submissions.close()
        self._leases.close()
        self._tools.close()
        self._reward_threads.close()
        self._sessions.close()

    # --- generating

    def generate(
        self,
        prompts: Sequence[PromptLike | Trajectory],
        n: int = 1,
        *,
        reward: Reward | None = None,
        min_finished: int | None = None,
        deadline: float | None = None,
    ) -> TrajectoryBatch:
        """``n`` trajectories for each prompt, in the order of the prompts, samples side by side.

        A paused trajectory among the prompts is gone on with, once. ``reward``, sync or async, is called
        with each finished trajectory in this process; its value is in the trajectory (and why it failed, in
        ``reward_error``).

        ``min_finished`` and ``deadline`` bring the batch back early: once so many rows have stopped (failures of
        engine or sandbox not counted), or so many seconds after the call, whichever is first. Rows that are not
        done then are paused (``TrajectoryBatch.unfinished``): given among the prompts of a later call they go
        on as if nothing had been.

        Raises :class:`~midstream.errors.PromptError` and other configuration errors before anything is
        sampled. What goes wrong later is in the stop reason of the row that it happened to.
        """
        failure: list[BaseException] = []
        ended = threading.Event()

        async def collect(drive: Drive) -> None:
            async with aclosing(drive.run()) as running:
                async for _ in running:
                    pass

        def work(drive: Drive) -> None:
            try:
                asyncio.run(collect(drive))
            except BaseException as error:  # noqa: BLE001  # raised again where the caller waits
                failure.append(error)
            finally:
                ended.set()

        with self._alone():
            drive = self._begun(self._checked(prompts, n, reward, min_finished, deadline))
            self._start_sandboxes()
            # A thread of its own, so that it works where an event loop runs already, as in a notebook.
            target = contextvars.copy_context().run
            thread = threading.Thread(target=target, args=(work, drive), name="midstream-generate")
            try:
                thread.start()
                # Not join: interrupted by Ctrl-C, that may take a running thread for an ended one.
                ended.wait()
            except BaseException:
                self._control.end(StopKind.CANCELLED)
                try:
                    if thread.ident is not None:
                        ended.wait()
                finally:
                    self.interrupted = self._batch(dict(drive.delivery.done))
                raise
            thread.join()
        if failure:
            raise failure[0]
        return self._batch(drive.delivery.done)

    async def generate_async(
        self,
        prompts: Sequence[PromptLike | Trajectory],
        n: int = 1,
        *,
        reward: Reward | None = None,
        min_finished: int | None = None,
        deadline: float | None = None,
    ) -> TrajectoryBatch:
        """As :meth:`generate`, on the running event loop."""
        with self._alone():
            drive = await self._begun_beside(prompts, n, reward, min_finished, deadline)
            try:
                async with aclosing(drive.run()) as running:
                    async for _ in running:
                        pass
            except asyncio.CancelledError:
                self.interrupted = self._batch(drive.delivery.done)
                raise
            return self._batch(drive.delivery.done)

    async def stream(
        self,
        prompts: Sequence[PromptLike | Trajectory],
        n: int = 1,
        *,
        reward: Reward | None = None,
        min_finished: int | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[Trajectory, None]:
        """As :meth:`generate`, but each trajectory as it finishes. Ending the iteration cancels the rest.

        Python closes an async iterator that is left by ``break`` only some time later;
        ``contextlib.aclosing`` does so at once, and the generator is free again.
        """
        with self._alone():
            drive = await self._begun_beside(prompts, n, reward, min_finished, deadline)
            async with aclosing(drive.run()) as running:
                async for index, trajectory in running:
                    del drive.delivery.done[index]  # a stream may be long, and whoever reads it keeps what they want
                    yield trajectory

    async def stream_deltas(
        self,
        prompts: Sequence[PromptLike | Trajectory],
        n: int = 1,
        *,
        reward: Reward | None = None,
        min_finished: int | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """As :meth:`stream`, but what is new of each row as it comes: generated ids, and results where they go in.

        A row's last :class:`~midstream.Delta` has its trajectory. Deltas of different rows come in any order, those
        of one row in order. Of a paused trajectory that is gone on with, what it holds already is not told again.
        Whoever reads slowly holds no row up: deltas wait in memory.
        """
        told: asyncio.Queue[Delta | None] = asyncio.Queue()
        with self._alone():
            drive = await self._begun_beside(prompts, n, reward, min_finished, deadline, told.put_nowait)
            async with aclosing(deltas_of(drive, told)) as deltas:
                async for delta in deltas:
                    yield delta

    def submit(
        self,
        prompt: PromptLike | Trajectory,
        *,
        sample: int = 0,
        sampling: Sampling | None = None,
        seed: int | None = None,
        session: KeptSession | None = None,
        listener: Listener | None = None,
    ) -> Future[Trajectory]:
        """One row, beside whatever other submitted rows are being generated. Returns at once, and from any thread;
        with asyncio, ``await asyncio.wrap_future(generator.submit(prompt))``.

        For callers whose rows come one by one, as in a server or in a trainer that has a task for each rollout.
        ``sample`` is the number of the prompt's sample: under one id and number a row has the same noise each time.
        ``sampling`` goes before the generator's. To cancel the future gives the row up, and its session is closed.
        ``seed``: the 64-bit key of the noise, by default made of the prompt's seed and id.
        ``session``: the interpreter in which earlier rows ran; one row at a time has it.
        ``listener`` is called with each :class:`~midstream.Delta` of the row, as :meth:`stream_deltas` gives them, in
        the thread that generates; it must return at once. The last one comes for rows that were given up, too.

        Raises what :meth:`generate` raises before anything is sampled. The future has the trajectory, whatever
        became of it; or the error, if none could be generated: such as a
        :class:`~midstream.errors.ProtocolError` while ``generate`` has the generator.
        """
        sample = checks.integer("sample", sample, 0)
        seed = checks.integer("seed", seed, optional=True)
        checks.instance("session", session, KeptSession, optional=True)
        if listener is not None and not callable(listener):
            raise ConfigurationError(f"listener={listener!r}: must be a function of a Delta, or None")
        if sampling is not None:
            checks.instance("sampling", sampling, Sampling)
            _check_sampling(self.engine, sampling)
        if not isinstance(prompt, Trajectory):
            prompt = as_prompt(prompt)
            prompt = prompt if prompt.id is not None else replace(prompt, id=f"submitted-{next(self._unnamed)}")
        (job,) = self._jobs([prompt], 1, listener)
        if job.paused is None:
            job = replace(job, first=sample, n=sample + 1, sampling=sampling, seed=job.seed if seed is None else seed)
        row = row_of(job, sample, self._settings(), self.engine)  # a bad prompt is refused here
        if session is not None:
            session.claim(sample_seed(row.seed, row.sample))
        future = self._submissions.submit(replace(job, session=session))
        if session is not None:
            future.add_done_callback(partial(_release_if_failed, session))
        return future

    @property
    def hold_sessions(self) -> float:
        """Seconds for which sessions are kept that no row is using."""
        return self._leases.seconds

    def end_session(self, session: KeptSession) -> None:
        """Close the interpreter of a kept session, if there is one, and forget what ran in it.

        Raises :class:`~midstream.errors.ProtocolError` while a row is using it.
        """
        if session.in_use:
            raise ProtocolError("end_session: a row is using it")
        session.history.clear()
        held = self._leases.take(session)
        if held is not None:
            held.close()

    def record(self, trajectory: Trajectory) -> Record:
        """A trajectory of this generator as it stands in a file, with where it came from."""
        engine = self.engine
        return Record.of(
            trajectory,
            engine.tokenizer,
            markup=self.markup,
            limits=self.limits,
            eos_ids=engine.eos_ids or None,
            context_length=engine.context_length,
            provenance=self.provenance,
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What a record says of where its trajectory came from: versions, engine, seed, isolation, sandboxes."""
        return {
            "midstream": version("midstream"),
            "engine": type(self.engine).__name__,
            "seed": self.seed,
            "tools": list(self._tools.tools.names),
            "isolation": self._sessions.isolation,
            "sandbox": self._sessions.settings,
        }

    # --- from other threads, while it generates

    def pause(self) -> None:
        """Come to rest between two tokens; returns when nothing is sampled any more. Code goes on running.

        Raises :class:`~midstream.errors.ProtocolError` on the event loop that generates, where it could only
        wait for itself.
        """
        self._control.pause()

    def resume(self) -> None:
        """Go on sampling."""
        self._control.resume()

    def update_weights(self, update: Callable[[], None], version: int, *, keep_cache: bool = False) -> None:
        """Rest, call ``update`` to change the model, mark later ids with ``version``, go on (if not paused).

        ``keep_cache`` keeps what the old weights have computed of the rows that are open; otherwise it is computed
        again. Each of them records which (``Trajectory.weight_changes``).

        Raises :class:`~midstream.errors.CapabilityError` where the engine tracks no versions.
        """
        if not self.engine.capabilities.set_weights:
            raise CapabilityError("update_weights: this engine does not take new weights while rows are open")
        with self._control.update():
            update()
            self.engine.set_weights(version, keep_cache=keep_cache)
            self._control.weights_changed(version, cache_kept=keep_cache)

    def interrupt(self) -> None:
        """Have ``generate`` return soon: finished rows, and the others paused, to be gone on with later."""
        self._control.end(StopKind.PAUSED)

    def cancel(self, prompt_id: str | None = None, sample: int | None = None) -> None:
        """Have ``generate`` return soon: finished rows, and the others cancelled.

        With ``prompt_id`` only that prompt's rows are cancelled, or its one ``sample``, and the others go on. Such a
        row stops between two steps, with what it has; where it is over already, nothing happens. A row that was
        submitted is cancelled by its future.
        """
        if prompt_id is not None:
            self._control.cancel(RowName(prompt_id, sample))
        elif sample is None:
            self._control.end(StopKind.CANCELLED)
        else:
            raise ConfigurationError(f"cancel: sample={sample!r} needs the prompt_id that it is a sample of")

    def fork(self, prompt_id: str, sample: int = 0, *, n: int = 1, replay: bool = False) -> Future[list[int]]:
        """Have ``n`` copies of a row that is being generated go their own ways from where it stands.

        A copy has the row's ids, what the engine has computed of them, and a live copy of its session. From there
        on its sampling noise is its own: it is a further sample of the prompt, numbered behind all others, and
        comes back behind them; its ``lineage`` says where it was forked. Copies do not wait for ``max_open_rows``.

        Returns at once. The row is copied between two ids, after the result of a block that is running; the
        future then has the copies' sample numbers. Do not wait for it in what the row itself waits for, such as
        a tool. It has a :class:`~midstream.errors.ProtocolError` where the row stopped before, and a
        :class:`~midstream.errors.SandboxError` where its session could not be copied, unless ``replay``: then
        the copies' sessions are built by running the row's blocks again, with the recorded tool results.

        Raises :class:`~midstream.errors.CapabilityError` where the engine cannot fork,
        :class:`~midstream.errors.ConfigurationError` without ``replay`` unless the pool was made with
        ``SandboxPool(forkable=True)``, and ``ProtocolError`` where nothing is being generated.
        """
        n = checks.integer("n", n, 1)
        if not self.engine.capabilities.fork:
            raise CapabilityError(
                "fork: this engine cannot copy rows; every engine of midstream's but PolicyEngine can"
            )
        if self.markup is not None and not replay and not self._sessions.forkable:
            raise ConfigurationError(
                "fork: its sandboxes cannot be copied; give the generator a SandboxPool(forkable=True), or "
                "replay=True to have the copies' sessions built by running the row's blocks again"
            )
        if self._submissions.active:
            raise ProtocolError("fork: rows that were submitted cannot be copied, for nobody waits for their copies")
        request = ForkRequest(prompt_id, sample, n, replay)
        self._control.fork(request)
        return request.copies

    # --- inside

    def _batch(self, done: Mapping[RowIndex, Trajectory]) -> TrajectoryBatch:
        return TrajectoryBatch([done[index] for index in sorted(done)], self.record)

    def _jobs(self, prompts: Sequence[PromptLike | Trajectory], n: int, listener: Listener | None = None) -> list[Job]:
        if self._closed:
            raise ProtocolError("this generator is closed")
        n = checks.integer("n", n, 1)
        named = named_prompts(prompts, media=self.engine.capabilities.media)
        return jobs_of(self._vocabulary, named, n, self._seed_of, listener)

    def _seed_of(self, prompt: Prompt) -> int:
        return prompt_seed(self.seed if prompt.seed is None else prompt.seed, str(prompt.id))

    def _checked(
        self,
        prompts: Sequence[PromptLike | Trajectory],
        n: int,
        reward: Reward | None,
        min_finished: int | None,
        deadline: float | None,
        listener: Listener | None = None,
    ) -> Drive:
        """A batch that can be generated. Takes long where prompts are many, since each is encoded here."""
        if reward is not None and not callable(reward):
            raise ConfigurationError(f"reward={reward!r}: must be a function of a trajectory, or None")
        jobs = self._jobs(prompts, n, listener)
        rows = sum(job.n for job in jobs)
        if min_finished is not None and not (_is_count(min_finished) and 1 <= min_finished <= rows):
            raise ConfigurationError(
                f"min_finished={min_finished!r}: must be an integer from 1 to the batch's {rows} rows, or None"
            )
        if deadline is not None and not (checks.is_number(deadline) and deadline > 0):
            raise ConfigurationError(f"deadline={deadline!r}: must be a number of seconds over 0, or None")
        settings = replace(self._settings(), reward=reward, min_finished=min_finished, deadline=deadline)
        drive = Drive(self.engine, settings, self._control, self._leases, jobs)
        drive.check()
        return drive

    def _begun(self, drive: Drive) -> Drive:
        self.progress = drive.settings.progress
        self.interrupted = None
        return drive

    async def _begun_beside(self, *asked: Any) -> Drive:
        """A checked batch, with its sandboxes. What takes long holds up nothing else on this event loop."""
        drive = self._begun(await asyncio.to_thread(self._checked, *asked))
        await asyncio.to_thread(self._start_sandboxes)
        return drive

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the generator for one batch, which waits for rows that were submitted to let go of it."""
        self._submissions.settle()
        with self._claimed():
            yield

    @contextmanager
    def _submitted(self, inbox: Inbox) -> Iterator[Drive]:
        """A drive of rows that come one by one, which has the generator to itself."""
        drive = Drive(self.engine, self._settings(), self._control, self._leases, (), inbox)
        with self._claimed():
            self._begun(drive)
            if self._closed:
                raise ProtocolError("this generator is closed")
            self._start_sandboxes()
            yield drive

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        self._control.claim()
        try:
            yield
        finally:
            self._control.release()

    def _settings(self) -> Settings:
        progress = Progress()
        return Settings(
            markup=self.markup,
            limits=self.limits,
            sampling=self.sampling,
            max_open_rows=self._max_open_rows,
            reward=None,
            reward_threads=self._reward_threads,
            open_session=self._sessions.open,
            fork_session=self._sessions.fork,
            tools=self._tools,
            observers=Observers((progress, *self._observers)),
            progress=progress,
        )

    def _start_sandboxes(self) -> None:
        """A machine that cannot isolate is refused before anything is sampled."""
        if self.markup is not None and self.markup.runs_code and not self._closed:
            self._sessions.start()

    def _make_pool(self) -> OwnPool:
        """Where sandboxes are, unless a pool was given."""
        from midstream.sandbox import SandboxPool

        return SandboxPool(observers=self._observers)


def _check_sampling(engine: Engine, sampling: Sampling) -> None:
    if not engine.capabilities.sampling and sampling != Sampling():
        raise CapabilityError(f"sampling={sampling}: this engine samples by settings of its own; set them there")


def _release_if_failed(session: KeptSession, future: Future[Trajectory]) -> None:
    if not future.cancelled() and future.exception() is not None:  # no drive is left to release it
        session.release()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
