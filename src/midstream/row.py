"""The state machine of one row: ids in, events out. It touches no model, process, clock or network.

An engine gives ids to :meth:`Row.receive`, which says how many of them count and what they mean. When a
block closes, the row waits: whoever runs code hands the results to :meth:`Row.inject`, which says what the
engine must put after the row's ids. Everything that the rules of generation (docs/semantics.md) say of one
row is decided here, so every engine obeys the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from midstream.budget import Budget
from midstream.decoding import TextDecoder, decode
from midstream.errors import PromptError, ProtocolError
from midstream.events import (
    BlockOpened,
    CodeDelta,
    Event,
    Execute,
    Inject,
    Nothing,
    Received,
    RowState,
    Stopped,
)
from midstream.markup import CODE_TAGS, Markup
from midstream.rendering import fit_results
from midstream.resuming import replay
from midstream.scanning import Closed, Code, Found, Matched, Opened, Scanner, block_left_open
from midstream.turns import Asked, Turns
from midstream.types import (
    Call,
    CallRecord,
    ExecutionResult,
    Limits,
    LogprobKind,
    Prompt,
    Sampling,
    Segment,
    StopKind,
    StopReason,
    Trajectory,
)
from midstream.vocabulary import Vocabulary

__all__ = [
    "INJECTED_VERSION",
    "BlockOpened",
    "CodeDelta",
    "Event",
    "Execute",
    "Inject",
    "Nothing",
    "Received",
    "Row",
    "RowState",
    "Stopped",
    "Stretch",
]

INJECTED_VERSION = -1
"""The weight version of ids that no weights sampled."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring ids of one origin: a segment, or its last part."""

    origin: Literal["generated", "injected"]
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    weight_versions: tuple[int, ...] = ()


class Row:
    """One sequence from its prompt to its end.

    ``markup=None`` scans for no blocks at all. ``context_length`` is the engine's, ``eos_ids`` the ids that
    end a sequence (by default the tokenizer's). ``prompt_ids`` spares encoding the prompt again where
    several samples share it.

    Raises :class:`~midstream.errors.PromptError` where the prompt is empty, fills the context or its limit, or is
    said to end inside a block and does not; ``TokenizerError`` and ``MarkupError`` where the
    tokenizer cannot serve the markup.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: Any,
        markup: Markup | None = CODE_TAGS,
        limits: Limits | None = None,
        *,
        prompt_ids: tuple[int, ...] | None = None,
        context_length: int | None = None,
        eos_ids: frozenset[int] | None = None,
        sample: int = 0,
        seed: int = 0,
        sampling: Sampling | None = None,
        logprob_kind: LogprobKind = "raw",
    ) -> None:
        self.prompt = prompt
        self.markup = markup
        self.limits = prompt.limits or limits or Limits()
        self.sample = sample
        self.seed = seed
        self._vocabulary = Vocabulary.of(tokenizer)
        self.sampling = sampling or Sampling()
        self._logprob_kind: LogprobKind = logprob_kind
        self._eos_ids = self._vocabulary.eos_ids if eos_ids is None else eos_ids
        self._forms = () if markup is None else markup.forms
        self._turns = Turns(self._forms, self._vocabulary)
        for text in markup.required_texts if markup else ():
            self._vocabulary.added_id(text)  # refused now, not when the first result is there
        self.prompt_ids = prompt_ids if prompt_ids is not None else self._vocabulary.encode_prompt(prompt)
        self._budget = Budget.of(len(self.prompt_ids), self.limits, context_length)
        self._check_room()
        self._state = RowState.GENERATING
        self._segments: list[Segment] = []  # finished ones
        self._ids: list[int] = []  # of the generated segment that is growing
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._decoder = TextDecoder(self._vocabulary)
        self._scanner = Scanner(markup, self.limits.stop_strings)
        self._discarded = 0
        self._records: list[CallRecord] = []
        self._pending: tuple[Call, ...] = ()
        self._stop_after: StopReason | None = None  # takes effect when the pending results are in
        self._stop: StopReason | None = None
        if prompt.open_block:
            self._scanner.open(*block_left_open(self._forms, decode(self._vocabulary, self.prompt_ids)))

    # --- driving it

    def receive(self, ids: Sequence[int], logprobs: Sequence[float], weight_version: int = 0) -> Received:
        """Take newly generated ids, up to the first that closes a block or stops the row.

        ``logprobs`` has one value per id. Raises :class:`ProtocolError` where it has not, and where the row
        waits for results or has stopped.
        """
        self._expect(RowState.GENERATING, "receive")
        if len(ids) != len(logprobs):
            raise ProtocolError(f"receive: {len(ids)} ids but {len(logprobs)} logprobs")
        events: list[Event] = []
        for count, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True), start=1):
            self._accept(int(token_id), float(logprob), weight_version, events)
            if self._state is not RowState.GENERATING:
                self._discarded += len(ids) - count
                return Received(count, tuple(events))
        return Received(len(ids), tuple(events))

    def inject(self, *results: ExecutionResult) -> Inject | Nothing | Stopped:
        """Take the results of the pending calls, one each and in order, and say how the row goes on.

        Where the row stops (there is no room for a result, or a stop string stood behind the block), the
        engine need not be told of the ids that may have been injected before it.
        """
        self._expect(RowState.EXECUTING, "inject")
        if len(results) != len(self._pending):
            raise ProtocolError(f"inject: {len(results)} results for {len(self._pending)} pending calls")
        calls, self._pending = self._pending, ()
        self._state = RowState.GENERATING
        shown = self._show(calls, results)
        if self._stop is None and self._stop_after is not None:
            self._finish(self._stop_after)
        if self._stop is None:
            self._stop_for_length()
        if self._stop is not None:
            return Stopped(self._stop)
        media = tuple(item for result in results for item in result.media)
        return Inject(shown, media) if shown or media else Nothing()

    def stop(self, reason: StopReason) -> None:
        """End the row here, from outside. Does nothing where it has stopped already."""
        if self._stop is None:
            self._finish(reason)

    def fork(self, *, sample: int | None = None, seed: int | None = None) -> Row:
        """A row with the same past, separate from here on."""
        other = object.__new__(Row)
        other.__dict__.update(self.__dict__)
        for name in ("_segments", "_ids", "_logprobs", "_versions", "_records"):
            setattr(other, name, list(getattr(self, name)))
        other._budget = replace(self._budget)
        other._decoder = self._decoder.copy()
        other._scanner = self._scanner.copy()
        other._turns = self._turns.copy()
        other.sample = self.sample if sample is None else sample
        other.seed = self.seed if seed is None else seed
        return other

    @classmethod
    def resume(
        cls,
        trajectory: Trajectory,
        tokenizer: Any,
        markup: Markup | None = CODE_TAGS,
        limits: Limits | None = None,
        *,
        context_length: int | None = None,
        eos_ids: frozenset[int] | None = None,
    ) -> Row:
        """The row of a paused trajectory, as it was. Calls that were waiting are in :attr:`pending`.

        ``markup`` must be the one that the trajectory was made with. Raises :class:`ProtocolError` where the
        trajectory is not resumable, or its blocks are not where the markup finds them.
        """
        if not trajectory.stop.resumable:
            raise ProtocolError(f"resume: the trajectory has stopped ({trajectory.stop}); only a paused one can go on")
        row = cls(
            trajectory.prompt,
            tokenizer,
            markup,
            limits,
            prompt_ids=trajectory.prompt_ids,
            context_length=context_length,
            eos_ids=eos_ids,
            sample=trajectory.sample,
            seed=trajectory.seed,
            sampling=trajectory.sampling,
            logprob_kind=trajectory.logprob_kind,
        )
        replay(row, trajectory)
        return row

    # --- looking at it

    @property
    def state(self) -> RowState:
        return self._state

    @property
    def pending(self) -> tuple[Call, ...]:
        """The calls that wait for their results."""
        return self._pending

    @property
    def records(self) -> tuple[CallRecord, ...]:
        """The row's blocks so far, those that wait included."""
        return (*self._records, *(CallRecord(call) for call in self._pending))

    @property
    def length(self) -> int:
        """Count of all ids, the prompt's included."""
        return self._budget.total

    @property
    def max_total_tokens(self) -> int | None:
        """The row never holds more ids than this; None where nothing bounds it."""
        return self._budget.longest(self.limits)

    @property
    def ids(self) -> list[int]:
        """All ids so far, the prompt's first."""
        return [*self.prompt_ids, *(i for segment in self._segments for i in segment.ids), *self._ids]

    def new_since(self, length: int) -> list[Stretch]:
        """What stands behind the row's first ``length`` ids, in order; the prompt is none of it.

        Costs time in the length of what is new, not of the row.
        """
        end = self.length
        found: list[Stretch] = []
        if self._ids and length < end:
            start = max(0, length - (end - len(self._ids)))
            versions = tuple(self._versions[start:])
            found.append(Stretch("generated", tuple(self._ids[start:]), tuple(self._logprobs[start:]), versions))
        end -= len(self._ids)
        for segment in reversed(self._segments):
            if length >= end:
                break
            start = max(0, length - (end - len(segment.ids)))
            parts = (segment.ids[start:], segment.logprobs[start:], segment.weight_versions[start:])
            found.append(Stretch(segment.origin, *parts))
            end -= len(segment.ids)
        return found[::-1]

    @property
    def trajectory(self) -> Trajectory:
        """Everything so far. While the row has not stopped, its stop reason is ``paused``."""
        segments = list(self._segments)
        if self._ids:
            segments.append(self._growing_segment(self._decoder.copy()))
        return Trajectory(
            prompt=self.prompt,
            prompt_ids=self.prompt_ids,
            segments=tuple(segments),
            calls=self.records,
            stop=self._stop or StopReason(StopKind.PAUSED),
            sample=self.sample,
            seed=self.seed,
            sampling=self.sampling,
            logprob_kind=self._logprob_kind,
            discarded=self._discarded,
        )

    # --- one id

    def _accept(self, token_id: int, logprob: float, version: int, events: list[Event]) -> None:
        self._ids.append(token_id)
        self._logprobs.append(logprob)
        self._versions.append(version)
        self._budget.generated += 1
        text = self._decoder.feed(token_id)
        found, stop = self._read(token_id, text)
        asked: list[Asked] = []
        for item in found:
            match item:
                case Opened():
                    events.append(BlockOpened(item.form))
                case Code():
                    events.append(CodeDelta(item.text))
                case Closed():
                    asked += self._turns.take(item, text)
                case Matched():
                    stop = StopReason(StopKind.STOP_STRING, item.stop_string)
        if self._turns.ended:
            asked += self._turns.finish()
            if not asked:  # what the turn held was no call
                stop = self._stop_at(token_id)
        calls = [self._call(one, earlier) for earlier, one in enumerate(asked)]
        length_stop = self._budget.reached(self.limits)
        if not calls or length_stop is not None:  # a block whose last id uses up the budget is not run
            reason = stop or length_stop
            if reason is not None:
                self._finish(reason)
                events.append(Stopped(reason))
            return
        self._await_results(calls, stop, events)

    def _read(self, token_id: int, text: str) -> tuple[list[Found], StopReason | None]:
        """What an id means: what its text completes, or that it ends a block, a turn or the row."""
        closed = self._turns.close(token_id, self._scanner)
        if closed is not None:
            return closed, None
        stop = self._stop_at(token_id)
        if stop is not None:
            return [], stop
        if token_id in self._eos_ids:
            self._scanner.reset(line_start=False)
            return [], None
        return self._scanner.feed(text), None

    def _stop_at(self, token_id: int) -> StopReason | None:
        if token_id in self._eos_ids:
            return None if self.limits.ignore_eos else StopReason(StopKind.END_OF_SEQUENCE, str(token_id))
        if token_id in self.limits.stop_ids:
            return StopReason(StopKind.STOP_ID, str(token_id))
        return None

    def _call(self, asked: Asked, earlier: int) -> Call:
        index = len(self._records) + earlier
        limit = self.limits.max_tool_calls
        declined = "" if limit is None or index < limit else f"Not run: the limit of {limit} calls is reached."
        return Call(index, asked.code, self.length, asked.lookahead, declined, asked.kind, asked.form)

    def _await_results(self, calls: list[Call], stop: StopReason | None, events: list[Event]) -> None:
        if self.limits.at_tool_call_limit == "stop":
            allowed = [call for call in calls if not call.declined]
            if len(allowed) < len(calls):
                stop = StopReason(StopKind.TOOL_CALL_LIMIT, str(self.limits.max_tool_calls))
                calls = allowed
            if not calls and stop is not None:
                self._finish(stop)
                events.append(Stopped(stop))
                return
        self._pending = tuple(calls)
        self._stop_after = stop
        self._state = RowState.EXECUTING
        events.append(Execute(self._pending))

    # --- results

    def _show(self, calls: tuple[Call, ...], results: tuple[ExecutionResult, ...]) -> tuple[int, ...]:
        """Append what the results show, and return its ids; stops the row where there is no room."""
        markup = self.markup
        if markup is None:
            raise ProtocolError("inject: the row has no markup, so it has no calls")
        forms = [self._forms[call.form] for call in calls]
        shown = [i for i, form in enumerate(forms) if results[i].text or form.inject_empty or form.turn is not None]
        injected = [""] * len(calls)
        cuts = [0] * len(calls)
        ids: tuple[int, ...] = ()
        if shown:
            room = self._budget.room(self.limits)
            texts = [(calls[i], results[i].text) for i in shown]
            fitted = fit_results(markup, self._vocabulary, texts, self.limits, room)
            if fitted is None:
                self._finish(StopReason(StopKind.LENGTH, "no_room_for_result"))
            else:
                ids = fitted.ids
                for i, text, cut in zip(shown, fitted.texts, fitted.cuts, strict=True):
                    injected[i], cuts[i] = text, cut
        for call, result, text, cut in zip(calls, results, injected, cuts, strict=True):
            self._records.append(CallRecord(call, result, text, cut))
        if ids:
            self._append_injected(ids)
        return ids

    def _append_injected(self, ids: tuple[int, ...]) -> None:
        self._close_segment()
        text = decode(self._vocabulary, ids)
        zeros = (0.0,) * len(ids)
        self._segments.append(Segment("injected", ids, zeros, (INJECTED_VERSION,) * len(ids), text))
        self._budget.injected += len(ids)
        self._scanner.reset(line_start=text.endswith("\n"), turn_start=self._turns.ended)
        self._turns.ended = False

    # --- ends

    def _stop_for_length(self) -> None:
        reason = self._budget.reached(self.limits)
        if reason is not None:
            self._finish(reason)

    def _finish(self, reason: StopReason) -> None:
        self._close_segment()
        self._stop = reason
        self._state = RowState.STOPPED

    def _close_segment(self) -> None:
        if self._ids:
            self._segments.append(self._growing_segment(self._decoder))
        self._ids, self._logprobs, self._versions = [], [], []
        self._decoder = TextDecoder(self._vocabulary)

    def _growing_segment(self, decoder: TextDecoder) -> Segment:
        decoder.flush()
        return Segment("generated", tuple(self._ids), tuple(self._logprobs), tuple(self._versions), decoder.text)

    # --- beginnings

    def _check_room(self) -> None:
        most = self._budget.max_total
        if most is not None and len(self.prompt_ids) >= most:
            name = f"prompt {self.prompt.id!r}" if self.prompt.id is not None else "a prompt"
            raise PromptError(
                f"{name} has {len(self.prompt_ids)} ids and the row may hold {most}: "
                "no room is left to generate; shorten it, or raise max_total_tokens or the context"
            )

    def _expect(self, state: RowState, method: str) -> None:
        if self._state is not state:
            raise ProtocolError(f"{method}: the row is {self._state.value}, it must be {state.value}")
