"""What a record alone cannot show: held against the tokenizer, and against the model.

The certificate (:func:`midstream.records.verify`) reads a record by itself. Here its ids are held against the
tokenizer that they are said to be of, and its logprobs against a model that reads the whole row at once (teacher
forcing). Importing this loads no torch; comparing with a model does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from midstream.errors import ConfigurationError
from midstream.markup import CODE_TAGS, Markup
from midstream.records import Record, Violation, verify
from midstream.types import Limits, Prompt, Trajectory
from midstream.vocabulary import Vocabulary

if TYPE_CHECKING:
    from midstream.teacher_forcing import Comparison


def verify_trajectory(
    trajectory: Trajectory,
    tokenizer: Any,
    *,
    markup: Markup | None = CODE_TAGS,
    limits: Limits | None = None,
    eos_ids: Iterable[int] | None = None,
    context_length: int | None = None,
    model: Any = None,
    tolerance: float | None = None,
) -> list[Violation]:
    """As :meth:`midstream.types.Trajectory.verify`."""
    record = Record.of(
        trajectory, tokenizer, markup=markup, limits=limits, eos_ids=eos_ids, context_length=context_length
    )
    violations = [*verify(record), *verify_with_tokenizer(record, tokenizer)]
    if model is None:
        if tolerance is not None:
            raise ConfigurationError(f"tolerance={tolerance}: is of comparing with a model; give model too")
        return violations
    (comparison,) = compare_with_model([record], model, tolerance=tolerance)
    return violations + comparison.violations


def compare_with_model(
    records: Sequence[Record], model: Any, *, tolerance: float | None = None, weight_version: int | None = None
) -> list[Comparison]:
    """Records held against a model of transformers: :func:`midstream.teacher_forcing.compare`."""
    from midstream.teacher_forcing import compare

    return compare(records, model, tolerance=tolerance, weight_version=weight_version)


def verify_with_tokenizer(record: Record, tokenizer: Any) -> list[Violation]:
    """What of a record is not as this tokenizer has it: bytes of ids, the ids of the prompt's text, and of results."""
    vocabulary = Vocabulary.of(tokenizer)
    # Where even the ids are another tokenizer's, what follows would be noise.
    return list(_pieces(record, vocabulary)) or [*_prompt(record, vocabulary), *_results(record, vocabulary)]


def _pieces(record: Record, vocabulary: Vocabulary) -> Iterator[Violation]:
    ids = [*record.prompt_ids, *(i for segment in record.segments for i in segment.ids)]
    for position, token_id in enumerate(ids):
        if token_id >= vocabulary.size or vocabulary.piece(token_id) != record.piece(token_id):
            message = f"id {token_id} is recorded as {record.piece(token_id)!r}, which it is not to this tokenizer"
            yield Violation("tokenizer", message, position)
            return


def _prompt(record: Record, vocabulary: Vocabulary) -> Iterator[Violation]:
    text = record.prompt.text
    if text is not None and list(vocabulary.encode_prompt(Prompt(text=text))) != record.prompt_ids:
        yield Violation("tokenizer", "the prompt's ids are not those that this tokenizer makes of its text", 0)


def _results(record: Record, vocabulary: Vocabulary) -> Iterator[Violation]:
    """Injected ids are what one call makes of the text between two special ids."""
    position = len(record.prompt_ids)
    for segment in record.segments:
        if segment.origin == "injected":
            for special, run in groupby(enumerate(segment.ids), lambda item: item[1] in vocabulary.added_ids):
                places, ids = zip(*run, strict=True)
                text = b"".join(map(vocabulary.piece, ids)).decode("utf-8", "replace")
                if not special and vocabulary.encode_text(text) != list(ids):
                    message = "the ids of a result are not those that this tokenizer makes of its text"
                    yield Violation("tokenizer", message, position + places[0])
        position += len(segment.ids)
