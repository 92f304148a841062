"""What a server does between HTTP and a generator: requests in, rows, and what is told of them."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec

from midstream.deltas import Delta
from midstream.engines.base import prompt_seed
from midstream.engines.server import ServerEngine
from midstream.errors import (
    CapabilityError,
    ConfigurationError,
    EngineError,
    MidstreamError,
    PromptError,
    ProtocolError,
    SandboxError,
)
from midstream.generation import Generator
from midstream.jobs import KeptSession
from midstream.records import RecordWriter
from midstream.serve.admission import Admission, ApiKeys, ServiceLimits
from midstream.serve.bodies import Form
from midstream.serve.choices import Choice
from midstream.serve.refusals import Refused, bad_field, stopping, upstream_failure
from midstream.serve.requests import Asked, ToScore, read_request
from midstream.serve.scoring import Scoring
from midstream.serve.sessions import NamedSessions
from midstream.types import Message, Prompt, StopKind, StopReason, Trajectory
from midstream.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_CANCELLED_WITHIN = 10.0
"""Seconds that rows which are cancelled may take to stop: a step of the engine."""


@dataclass(slots=True, eq=False)
class Answering:
    """A request whose rows are under way. ``earlier_blocks``: how many other requests' ran in its session."""

    asked: Asked
    form: Form
    client: str
    choices: list[Choice]
    futures: list[Future[Trajectory]] = field(default_factory=list)
    records: list[asyncio.Task[None]] = field(default_factory=list)
    left: int = 0
    earlier_blocks: int = 0
    _told: asyncio.Queue[tuple[int, Delta | BaseException]] = field(default_factory=asyncio.Queue)

    def tell(self, index: int, news: Delta | BaseException) -> None:
        self._told.put_nowait((index, news))

    async def news(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Each delta with the index of its choice, until all rows are over. Raises :class:`Refused` if one failed."""
        over = 0
        while over < len(self.choices):
            index, news = await self._told.get()
            if isinstance(news, BaseException):
                logger.error("request %s: no row could be generated", self.form.id, exc_info=news)
                raise Refused(500, "the server failed", code="server_failure")
            if news.trajectory is not None:
                over += 1
                _refuse_failures(news.trajectory.stop)
            yield index, news

    async def recorded(self) -> None:
        """Wait until the records of rows that are over are written. To give up waiting does not stop that."""
        if self.records:
            await asyncio.wait(self.records)

    def cancel(self) -> None:
        """Nobody waits for the rows any more."""
        for future in self.futures:
            future.cancel()


class Service:
    """Answers requests with rows of a generator.

    - ``generator``: the rows'; its limits and sampling are the defaults, and the limits bound what may be asked for. It
      should have ``max_open_rows=limits.rows``, and ``hold_sessions`` for sessions that clients name.
    - ``model``: the name that the model goes by. ``keys``: who may ask; None lets everybody, by their address.
    - ``instructions``: put in front of each chat, as what the system says. ``render``: makes a chat's ids of its
      turns (mappings of ``role`` and ``content``), in place of the tokenizer's chat template as it is.
    - ``record``: where rows go when they are over (those that were cancelled do not); ``provenance`` goes with each.

    Used in one event loop.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        model: str,
        keys: ApiKeys | None = None,
        limits: ServiceLimits | None = None,
        instructions: str | None = None,
        render: Callable[[list[dict[str, str]]], Sequence[int]] | None = None,
        record: RecordWriter | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.generator = generator
        self.model = model
        self.keys = keys
        self.limits = limits or ServiceLimits()
        self.admission = Admission(self.limits)
        self.sessions = NamedSessions(generator.hold_sessions, self.limits.sessions_per_client, generator.end_session)
        self.draining = False
        self._instructions = instructions
        self._render = render
        self._record = record
        self._provenance = provenance or {}
        self._vocabulary = Vocabulary.of(generator.engine.tokenizer)
        self._encoding = asyncio.Lock()  # a tokenizer is used by one thread at a time
        self._writing = asyncio.Lock()
        self._under_way: set[Answering | Scoring] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._records: set[asyncio.Task[None]] = set()
        self.unrecorded = 0

    # --- answering

    def read(self, body: bytes, client: str, *, chat: bool) -> Asked | ToScore:
        """What a client's request asks for; it is counted. Raises :class:`Refused`."""
        if self.draining:
            raise stopping()
        self.admission.count_request(client)
        asked = read_request(body, chat=chat, limits=self.generator.limits, sampling=self.generator.sampling)
        if asked.model not in (None, self.model):
            message = f"model: {asked.model!r} is not served here; {self.model!r} is"
            raise Refused(404, message, param="model", code="model_not_found")
        return asked

    async def answer(self, asked: Asked, client: str) -> Answering:
        """Start the rows that are asked for. Raises :class:`Refused`."""
        if asked.logprobs and self.generator.engine.capabilities.logprobs is None:
            raise bad_field("logprobs", "the server behind this one gives none", "unsupported_parameter")
        leave = self.admission.enter(client, asked.rows)
        answering = None
        try:
            session, new = None, False
            if asked.session is not None:
                session, new = self.sessions.take(client, asked.session)
            answering = self._begin(asked, client, new)
            answering.earlier_blocks = 0 if session is None else len(session.history)
            await self._submit(answering, session, leave)
        except BaseException:
            begun = 0 if answering is None else len(answering.futures)
            for _ in range(asked.rows - begun):
                leave()
            if answering is not None:
                answering.left -= asked.rows - begun
                answering.cancel()
                self._settle(answering)
            elif session is not None and asked.session is not None:
                self.sessions.used(client, asked.session)
            raise
        return answering

    async def score(self, asked: ToScore, client: str) -> Scoring:
        """Start what scores the texts, by the server behind this one. Raises :class:`Refused`."""
        engine = self.generator.engine
        if not isinstance(engine, ServerEngine):
            message = "texts are scored by a server behind this one, and there is none"
            raise bad_field("echo", message, "unsupported_parameter")
        leave = self.admission.enter(client, len(asked.prompts))
        try:
            async with self._encoding:
                await asyncio.to_thread(self._check_lengths, asked)
        except BaseException:
            for _ in asked.prompts:
                leave()
            raise
        seconds = self.generator.limits.time_limit
        scoring = Scoring(engine, asked, self._form(chat=False), leave, self._end, seconds=seconds)
        self._under_way.add(scoring)
        self._quiet.clear()
        return scoring

    def _check_lengths(self, asked: ToScore) -> None:
        most = self.generator.limits.max_total_tokens
        for prompt in asked.prompts:
            try:
                length = len(self._vocabulary.encode_prompt(prompt))
            except PromptError as error:
                raise _bad_prompt(error, chat=False) from error
            if most is not None and length + asked.max_tokens > most:
                message = f"{length} ids, and max_tokens={asked.max_tokens}; {most} are the most here"
                raise bad_field("prompt", message, "context_length_exceeded")

    def _begin(self, asked: Asked, client: str, new: bool) -> Answering:
        form = self._form(
            chat=asked.chat,
            n=asked.n,
            logprobs=asked.logprobs,
            ids=asked.include_ids,
            include_usage=asked.include_usage,
            session=None if asked.session is None else {"id": asked.session, "new": new},
        )
        choices = [Choice(self._vocabulary, asked.limits.stop_strings, asked.logprobs) for _ in range(asked.rows)]
        answering = Answering(asked, form, client, choices, left=asked.rows)
        self._under_way.add(answering)
        self._quiet.clear()
        return answering

    def _form(self, *, chat: bool, **options: Any) -> Form:
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return Form(chat=chat, id=name, created=int(time.time()), model=self.model, **options)

    async def _submit(self, answering: Answering, session: KeptSession | None, leave: Callable[[], None]) -> None:
        asked = answering.asked
        for place, prompt in enumerate(asked.prompts):
            prompt = self._complete(prompt, answering, place)
            for sample in range(asked.n):
                take = self._taker(answering, len(answering.futures), leave)
                submit = partial(
                    self._start,
                    prompt,
                    sample=sample,
                    sampling=asked.sampling,
                    session=session,
                    listener=take,
                    **_noise(asked.seed, place),
                )
                try:
                    async with self._encoding:
                        future, cancelled = await _to_its_end(submit)
                except ProtocolError as error:  # it is closed, or somebody else has it
                    raise stopping() from error
                except (EngineError, SandboxError) as error:
                    if isinstance(error, CapabilityError):  # what the client wants sampled, this engine cannot do
                        raise _bad_prompt(error, chat=asked.chat) from error
                    logger.exception("request %s: its row could not be begun", answering.form.id)
                    raise Refused(500, "the server failed", code="server_failure") from error
                except Exception as error:  # a chat template is a program, and refuses as it likes
                    raise _bad_prompt(error, chat=asked.chat) from error
                answering.futures.append(future)
                future.add_done_callback(take.failed)
                if cancelled:
                    raise asyncio.CancelledError

    def _start(self, prompt: Prompt, **row: Any) -> Future[Trajectory]:
        """In a thread: a chat may be long, and its template is a program."""
        if prompt.messages is not None and self._render is not None:
            turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
            prompt = replace(prompt, messages=None, ids=tuple(self._render(turns)))
        return self.generator.submit(prompt, **row)

    def _complete(self, prompt: Prompt, answering: Answering, place: int) -> Prompt:
        """A request's prompt with the id, the limits and what goes into records."""
        asked = answering.asked
        name = answering.form.id if len(asked.prompts) == 1 else f"{answering.form.id}-{place}"
        named = {} if asked.session is None else {"session": asked.session}
        metadata = {"client": answering.client, **named, **asked.metadata}
        prompt = replace(prompt, id=name, group=answering.form.id, limits=asked.limits, metadata=metadata)
        if prompt.messages is not None and self._instructions:
            prompt = replace(prompt, messages=instructed(prompt.messages, self._instructions))
        return prompt

    def _taker(self, answering: Answering, index: int, leave: Callable[[], None]) -> _Taker:
        loop = asyncio.get_running_loop()

        def take(news: Delta | BaseException) -> None:
            over = isinstance(news, BaseException) or news.trajectory is not None
            if over:
                leave()
                answering.left -= 1
            if isinstance(news, Delta) and news.trajectory is not None and self._record is not None:
                answering.records.append(self._start_recording(self._record, news.trajectory, answering))
            answering.tell(index, news)
            if over:
                self._settle(answering)

        return _Taker(loop, take)

    def _settle(self, answering: Answering) -> None:
        """Where all rows of a request are over, it is none that is under way."""
        if answering.left > 0:
            return
        if answering.asked.session is not None:
            self.sessions.used(answering.client, answering.asked.session)
        self._end(answering)

    def _end(self, request: Answering | Scoring) -> None:
        self._under_way.discard(request)
        if not self._under_way:
            self._quiet.set()

    # --- records

    def _start_recording(
        self, writer: RecordWriter, trajectory: Trajectory, answering: Answering
    ) -> asyncio.Task[None]:
        earlier = {"earlier_blocks": answering.earlier_blocks} if answering.earlier_blocks else {}
        task = asyncio.create_task(self._write(writer, trajectory, earlier))
        self._records.add(task)
        task.add_done_callback(self._records.discard)
        return task

    async def _write(self, writer: RecordWriter, trajectory: Trajectory, earlier: dict[str, int]) -> None:
        if trajectory.stop.kind in (StopKind.CANCELLED, StopKind.PAUSED):
            return  # it is not finished, and nobody will have it
        try:
            record = self.generator.record(trajectory)
            record = msgspec.structs.replace(record, provenance={**record.provenance, **self._provenance, **earlier})
            async with self._writing:
                await asyncio.to_thread(writer.append, record)
        except MidstreamError:
            # The answer is right all the same, and its client is not to wait for a disk.
            self.unrecorded += 1
            logger.exception("the rollout of %s was not recorded", trajectory.prompt.id)

    # --- the end

    async def drain(self, grace: float) -> None:
        """Take no more requests, wait ``grace`` seconds for those under way, and cancel the rest."""
        self.draining = True
        try:
            async with asyncio.timeout(grace):
                await self._quiet.wait()
        except TimeoutError:
            logger.warning("%d requests were not done after %g s; they end here", len(self._under_way), grace)
            for request in list(self._under_way):
                request.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(_CANCELLED_WITHIN):
                    await self._quiet.wait()
        while self._records:
            await asyncio.wait(self._records)


class _Taker:
    """A row's listener, called in the thread that generates, that has what it is told taken in the server's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Callable[[Delta | BaseException], None]) -> None:
        self._loop = loop
        self._take = take

    def __call__(self, delta: Delta) -> None:
        self._tell(delta)

    def failed(self, future: Future[Trajectory]) -> None:
        """For a future that is done: where it failed, its row is never told to be over."""
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._tell(error)

    def _tell(self, news: Delta | BaseException) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._take, news)


async def _to_its_end(submit: Callable[[], Future[Trajectory]]) -> tuple[Future[Trajectory], bool]:
    """Call in a thread, and have what it gives even where this task is cancelled meanwhile, and whether it was."""
    work = asyncio.ensure_future(asyncio.to_thread(submit))
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    return work.result(), cancelled


def instructed(messages: tuple[Message, ...], instructions: str) -> tuple[Message, ...]:
    """A chat in which the system says ``instructions`` first, and then what it said."""
    if messages[0].role == "system":
        return (Message("system", f"{instructions}\n\n{messages[0].content}"), *messages[1:])
    return (Message("system", instructions), *messages)


def _noise(seed: int | None, place: int) -> dict[str, int]:
    """The key of a request's noise, where it gives a seed: with the same one the same request has the same answer."""
    return {} if seed is None else {"seed": prompt_seed(seed, str(place))}


def _bad_prompt(error: Exception, *, chat: bool) -> Refused:
    code = "context_length_exceeded" if "no room is left" in str(error) else "invalid_value"
    message = str(error) if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {error}"
    return bad_field("messages" if chat else "prompt", message, code)


def _refuse_failures(stop: StopReason) -> None:
    match stop.kind:
        case StopKind.ENGINE_FAILURE if stop.detail.startswith(CapabilityError.__name__):
            raise Refused(400, stop.detail, code="unsupported_parameter")  # sampling that this engine cannot do
        case StopKind.ENGINE_FAILURE:
            raise upstream_failure(stop.detail)
        case StopKind.SANDBOX_FAILURE:
            raise Refused(500, f"the code could not be run: {stop.detail}", code="sandbox_failure")
        case StopKind.CANCELLED | StopKind.PAUSED:
            raise stopping()
