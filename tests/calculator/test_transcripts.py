"""Training ids are the ids that the library makes of the same text, and overhang is really in them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from midstream.markup import CODE_TAGS, text_of
from midstream.row import Execute, Inject, Nothing, Row, Stopped
from midstream.types import ExecutionResult, Prompt, StopKind
from problems import KINDS, Problem, Step, prompt_text, training_problems
from transcripts import END_OF_SEQUENCE, END_TAG, Example, Piece, direct_pieces, encode, pieces, result_text
from vocabulary import VOCABULARY_SIZE, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def _examples(tokenizer: Tokenizer, count: int, seed: int = 21) -> list[tuple[Problem, Example]]:
    rng = random.Random(seed)
    drawn = itertools.islice(training_problems(seed, dict.fromkeys(KINDS, 1.0)), count)
    return [(problem, encode(pieces(problem, rng), tokenizer)) for problem in drawn]


def _drive(problem: Problem, example: Example, tokenizer: Tokenizer) -> Row:
    """Gives a row the ids that the model writes and the results of the solution's blocks, as an engine would."""
    end = tokenizer.token_to_id(END_OF_SEQUENCE)
    row = Row(Prompt(text=prompt_text(problem.question)), tokenizer, CODE_TAGS, eos_ids=frozenset([end]))
    shown = iter(step.shown for step in problem.steps)
    position = len(row.prompt_ids)
    while position < len(example.ids):
        assert example.mask[position] == 1, "an id that the row does not inject is marked as given"
        events = row.receive([example.ids[position]], [0.0]).events
        position += 1
        for event in events:
            if isinstance(event, Execute):
                match row.inject(*(ExecutionResult(next(shown)) for _ in event.calls)):
                    case Inject(ids):
                        position += len(ids)
                    case Nothing():
                        pass
                    case Stopped(reason):
                        raise AssertionError(reason)
    return row


def test_the_library_makes_the_same_ids_and_mask(tokenizer: Tokenizer) -> None:
    for problem, example in _examples(tokenizer, 400):
        row = _drive(problem, example, tokenizer)
        trajectory = row.trajectory
        assert trajectory.stop.kind is StopKind.END_OF_SEQUENCE
        assert trajectory.ids == example.ids
        assert trajectory.mask == example.mask
        assert [record.call.code.strip() for record in trajectory.calls] == [step.code for step in problem.steps]


def test_every_kind_of_overhang_occurs(tokenizer: Tokenizer) -> None:
    lookaheads: Counter[str] = Counter()
    for problem, example in _examples(tokenizer, 400):
        row = _drive(problem, example, tokenizer)
        for record, step in zip(row.trajectory.calls, problem.steps, strict=True):
            lookaheads[("shown " if step.shown else "silent ") + repr(record.call.lookahead)] += 1
    for expected in (
        "shown ''",
        "shown '<'",
        r"shown '\n'",
        r"shown '\n\n'",
        "silent '<'",
        "silent 's'",
        r"silent '\n'",
    ):
        assert lookaheads[expected] >= 5, lookaheads


@pytest.mark.parametrize("code", ["6 * 7", "\n6 * 7\n"])
def test_results_are_framed_as_the_markup_frames_them(code: str) -> None:
    assert result_text(code, "42") == text_of(CODE_TAGS.render(code, "42"))


def test_a_lookahead_is_left_out_of_the_result_and_stays_with_the_model(tokenizer: Tokenizer) -> None:
    written = Piece(f"<code>6 * 7{END_TAG}", written=True, foresight="<result>42</result>")
    example = encode(iter([written, Piece("<result>42</result>", written=False)]), tokenizer)
    texts = [tokenizer.decode([token_id]) for token_id in example.ids[:-1]]
    last_written = max(index for index, flag in enumerate(example.mask[:-1]) if flag)
    assert texts[last_written] == "><"
    assert "".join(texts[last_written + 1 :]) == "result>42</result>"


def test_a_lookahead_that_the_result_does_not_start_with_stays(tokenizer: Tokenizer) -> None:
    written = Piece(f"<code>6 * 7{END_TAG}", written=True, foresight="\n")
    example = encode(iter([written, Piece("<result>42</result>", written=False)]), tokenizer)
    assert tokenizer.decode(example.ids[:-1]) == "<code>6 * 7</code>\n<result>42</result>"


def test_direct_transcripts_hold_no_code(tokenizer: Tokenizer) -> None:
    problem = Problem("arithmetic", "Compute 6 * 7.", "42", ("6", "7"), (Step("6 * 7", "42"),))
    example = encode(direct_pieces(problem), tokenizer)
    prompt_length = len(tokenizer.encode(prompt_text(problem.question)).ids)
    assert tokenizer.decode(example.ids) == "Q: Compute 6 * 7.\nA: The answer is 42."
    assert example.mask == [0] * prompt_length + [1] * (len(example.ids) - prompt_length)
    assert example.ids[-1] == tokenizer.token_to_id(END_OF_SEQUENCE)


def test_the_vocabulary_has_the_merges_that_overhang(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == VOCABULARY_SIZE
    assert {"><", ">Ċ", ">ĊĊ", "()</", ">s"} <= vocabulary.keys()


def test_what_is_copied_is_one_token_a_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("48213").tokens == list("48213")
    assert tokenizer.encode("'letters'").tokens == list("'letters'")
    assert tokenizer.encode(" -907").tokens == ["Ġ", *"-907"]


def test_the_tokenizer_is_lossless(tokenizer: Tokenizer) -> None:
    for text in ("<code>\n\tx = 'é'\n\n</code>  ok\n \n", "don't -3 --3 >-3 > -3", "日本 🙂\r\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_tokenizer_is_the_same_every_time(tokenizer: Tokenizer) -> None:
    assert train_tokenizer().to_str() == tokenizer.to_str()
