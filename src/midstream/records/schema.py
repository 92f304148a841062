"""What a record holds: schema 1 of the JSON that one finished trajectory becomes.

A record stands alone. Besides the trajectory it has the rules that the row obeyed (markup, limits, the ids
that end it), the bytes of every id, and where it came from, so that it can be read and checked without the
tokenizer, the model or this library. Every field is written always, unknown ones are refused, and only those that came
to a schema later may be missing: what a record says is what its schema number says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, TypeVar

import msgspec

from midstream.errors import RecordError
from midstream.markup import CODE_TAGS, Markup
from midstream.records.entries import (
    BlockEntry,
    Entry,
    ForkPointEntry,
    LimitsEntry,
    MarkupEntry,
    PromptEntry,
    SamplingEntry,
    SegmentEntry,
    StopEntry,
    WeightChangeEntry,
)
from midstream.types import (
    CallRecord,
    Limits,
    LogprobKind,
    ToolCall,
    Trajectory,
)
from midstream.vocabulary import Vocabulary, replace_surrogates

SCHEMA = 1
"""The schema that is written. Readers take this one and every older one."""

FIRST_BYTES = b'{"schema":'
"""How every record begins."""

T = TypeVar("T")


class Record(Entry):
    """One trajectory as it stands in a file. Made by :meth:`of`; :attr:`trajectory` gives it back.

    - ``prompt_ids``, ``prompt_text``: the prompt as it was encoded, and what those ids decode to.
    - ``mask``: runs of ``[bit, length]``: 1 on generated ids, 0 on the prompt's and injected ones.
    - ``total_length``: the count of all ids.
    - ``limits``: those that the row obeyed (the prompt's own where it has some).
    - ``context_length``: the most ids that the engine could hold, or None.
    - ``eos_ids``; ``closing_ids`` (of the markup's closing tokens, whichever form's); ``special_ids``: those of the
      record's ids that are special or other added tokens and that no plain text becomes. All sorted.
    - ``pieces``: the text of every id that occurs and is whole UTF-8; ``partial_pieces``: the bytes of the
      others, in hexadecimal.
    - ``provenance``: where it came from (versions, engine, isolation, settings), as the writer says.
    - ``lineage``: of a row that was forked from others, where, the oldest first; else empty.
    - ``weight_changes``: those that came while the row was open, in order.
    """

    schema: Literal[1]
    prompt: PromptEntry
    sample: int
    seed: int
    stop: StopEntry
    reward: float | None
    reward_error: str
    total_length: int
    prompt_ids: list[int]
    prompt_text: str
    mask: list[tuple[Literal[0, 1], int]]
    segments: list[SegmentEntry]
    calls: list[BlockEntry]
    sampling: SamplingEntry
    logprob_kind: LogprobKind
    fit_for_training: bool
    discarded: int
    duration: float
    markup: MarkupEntry | None
    limits: LimitsEntry
    context_length: int | None
    eos_ids: list[int]
    closing_ids: list[int]
    special_ids: list[int]
    pieces: dict[int, str]
    partial_pieces: dict[int, str]
    provenance: dict[str, Any]
    lineage: list[ForkPointEntry] = msgspec.field(default_factory=list)
    weight_changes: list[WeightChangeEntry] = msgspec.field(default_factory=list)

    @classmethod
    def of(
        cls,
        trajectory: Trajectory,
        tokenizer: Any,
        *,
        markup: Markup | None = CODE_TAGS,
        limits: Limits | None = None,
        eos_ids: Iterable[int] | None = None,
        context_length: int | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Record:
        """The record of a trajectory. The arguments are those that its :class:`~midstream.row.Row` had.

        Raises :class:`~midstream.errors.RecordError` where a number is not finite, or ``metadata`` or
        ``provenance`` holds what JSON lacks. Lone surrogates become U+FFFD.
        """
        vocabulary = Vocabulary.of(tokenizer)
        pieces = {token_id: vocabulary.piece(token_id) for token_id in sorted(set(trajectory.ids))}
        whole = {token_id: text for token_id, piece in pieces.items() if (text := _whole(piece)) is not None}
        prompt_bytes = b"".join(pieces[token_id] for token_id in trajectory.prompt_ids)
        fields: dict[str, Any] = {
            "schema": SCHEMA,
            "prompt": replace(trajectory.prompt, metadata=_strict_json(trajectory.prompt.metadata, "prompt.metadata")),
            "sample": trajectory.sample,
            "seed": trajectory.seed,
            "stop": trajectory.stop,
            "reward": None if trajectory.reward is None else float(trajectory.reward),
            "reward_error": trajectory.reward_error,
            "total_length": trajectory.total_length,
            "prompt_ids": trajectory.prompt_ids,
            "prompt_text": prompt_bytes.decode("utf-8", "replace"),
            "mask": [(bit, len(list(run))) for bit, run in groupby(trajectory.mask)],
            "segments": trajectory.segments,
            "calls": [_with_plain_tool_calls(record) for record in trajectory.calls],
            "sampling": trajectory.sampling,
            "logprob_kind": trajectory.logprob_kind,
            "fit_for_training": trajectory.fit_for_training,
            "discarded": trajectory.discarded,
            "duration": trajectory.duration,
            "markup": markup,
            "limits": trajectory.prompt.limits or limits or Limits(),
            "context_length": context_length,
            "eos_ids": sorted(vocabulary.eos_ids if eos_ids is None else eos_ids),
            "closing_ids": sorted({vocabulary.added_id(text) for text in _closing_texts(markup)}),
            "special_ids": sorted(vocabulary.added_ids & pieces.keys()),
            "pieces": whole,
            "partial_pieces": {i: piece.hex() for i, piece in pieces.items() if i not in whole},
            "provenance": _strict_json(provenance or {}, "provenance"),
            "lineage": trajectory.lineage,
            "weight_changes": trajectory.weight_changes,
        }
        try:
            record = msgspec.convert(fields, cls, from_attributes=True)
        except msgspec.ValidationError as error:
            raise RecordError(f"a trajectory cannot be recorded: {explain(error)}") from error
        return record._checked()

    @property
    def trajectory(self) -> Trajectory:
        """The trajectory again. Raises :class:`~midstream.errors.RecordError` where the record cannot be one."""
        trajectory = _convert(self, Trajectory)
        return replace(trajectory, calls=tuple(_with_tuples(record) for record in trajectory.calls))

    @property
    def row_markup(self) -> Markup | None:
        """The markup as :class:`~midstream.row.Row` takes it. Raises ``RecordError`` where it cannot work."""
        return None if self.markup is None else _convert(self.markup, Markup)

    @property
    def row_limits(self) -> Limits:
        """The limits as a row takes them. Raises ``RecordError`` where they are impossible."""
        return _convert(self.limits, Limits)

    @property
    def key(self) -> tuple[str | None, int]:
        """The prompt's id and the sample's number: no two records of a file share it."""
        return self.prompt.id, self.sample

    def piece(self, token_id: int) -> bytes | None:
        """The bytes of an id, or None where the record does not say."""
        text = self.pieces.get(token_id)
        if text is not None:
            return text.encode()
        digits = self.partial_pieces.get(token_id)
        if digits is None:
            return None
        try:
            return bytes.fromhex(digits)
        except ValueError:
            return None

    def encode(self) -> bytes:
        """The record as one line of JSON, without the newline."""
        return _encoder.encode(self)

    def _checked(self) -> Record:
        for index, segment in enumerate(self.segments):
            if not all(map(math.isfinite, segment.logprobs)):
                raise RecordError(f"a trajectory cannot be recorded: segments[{index}].logprobs: not all are finite")
        builtins = msgspec.to_builtins(self)
        # The longest fields hold numbers that are finite as seen above, or integers: no need to walk them.
        long = {name: builtins.pop(name) for name in ("prompt_ids", "mask", "pieces", "partial_pieces")}
        numbers = [{name: entry.pop(name) for name in ("ids", "logprobs")} for entry in builtins["segments"]]
        clean = _strict_json(builtins, "")
        if clean == builtins:
            return self
        for entry, popped in zip(clean["segments"], numbers, strict=True):
            entry.update(popped)
        return _convert({**clean, **long}, Record)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)
# msgspec learns a class at its first use, and two threads that are first at the same time crash the process.
_learnt = [msgspec.json.Decoder(kind) for kind in (Trajectory, Markup, Limits)]


class _Version(msgspec.Struct):
    schema: int


def decode_record(line: bytes) -> Record:
    """The record that a line of JSON holds. Raises :class:`~midstream.errors.RecordError`, naming the field."""
    try:
        return _decoder.decode(line)
    except msgspec.ValidationError as error:
        raise RecordError(_other_schema(line) or explain(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise RecordError("nested too deeply") from error


def explain(error: msgspec.ValidationError) -> str:
    """A validation error with the field first, as ``segments[0].ids[3]: Expected `int`, got `str```."""
    message, _, place = str(error).partition(" - at `$")
    field = place.rstrip("`").lstrip(".")
    return f"{field}: {message}" if field else message


def _other_schema(line: bytes) -> str | None:
    try:
        version = msgspec.json.decode(line, type=_Version).schema
    except msgspec.ValidationError:
        return "schema: missing, or no number; this is no record of midstream's"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # further on; the first fault is told
        return None
    return None if version == SCHEMA else f"schema {version}: this midstream reads schema {SCHEMA}"


def _convert(entry: Any, wanted: type[T]) -> T:
    try:
        return msgspec.convert(entry, wanted, from_attributes=True)
    except msgspec.ValidationError as error:
        raise RecordError(explain(error)) from error


def _closing_texts(markup: Markup | None) -> list[str]:
    return [] if markup is None else [text for form in markup.forms for text in form.closing_tokens]


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _strict_json(value: Any, place: str) -> Any:
    """``value`` with lone surrogates replaced. Raises where it holds a number or an object that JSON lacks."""
    match value:
        case str():
            return replace_surrogates(value)
        case None | bool() | int():
            return value
        case float():
            if not math.isfinite(value):
                raise RecordError(f"a trajectory cannot be recorded: {place or 'it'}={value}: must be finite")
            return value
        case Mapping():
            items = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    raise RecordError(f"a trajectory cannot be recorded: {place}: the key {key!r} must be a string")
                items[replace_surrogates(key)] = _strict_json(item, f"{place}.{key}".lstrip("."))
            return items
        case list() | tuple():
            return [_strict_json(item, f"{place}[{index}]") for index, item in enumerate(value)]
        case _:  # a record is for other programs too: nothing is written that would come back as another thing
            raise RecordError(f"a trajectory cannot be recorded: {place}: JSON has no {type(value).__name__}")


def _with_plain_tool_calls(record: CallRecord) -> CallRecord:
    """Tools' values come from anywhere, and a finished trajectory is never refused for one of them."""
    return _map_tool_calls(
        record,
        lambda call: replace(
            call,
            arguments=tuple(_lenient_json(item) for item in call.arguments),
            keyword_arguments={str(key): _lenient_json(item) for key, item in call.keyword_arguments.items()},
            value=_lenient_json(call.value),
        ),
    )


def _with_tuples(record: CallRecord) -> CallRecord:
    return _map_tool_calls(record, lambda call: replace(call, arguments=tuple(call.arguments)))


def _map_tool_calls(record: CallRecord, change: Callable[[ToolCall], ToolCall]) -> CallRecord:
    result = record.result
    if result is None or not result.tool_calls:
        return record
    return replace(record, result=replace(result, tool_calls=tuple(map(change, result.tool_calls))))


def _lenient_json(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else repr(value)
        case Mapping():
            return {str(key): _lenient_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_lenient_json(item) for item in value]
        case _:
            return repr(value)
