"""The policy engine by itself: what it hands to the policy in each round, and what it makes of the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from midstream import Capabilities, Engine, PolicyEngine, RowRequest, errors
from midstream.engines.policy import default_pad_id
from midstream.types import Media
from tests.policies import padded_output
from tests.vocabularies import tokenizer, vocabulary

NAME = "o200k"
EOS = min(vocabulary(NAME).eos_ids)


def ids_of(text: str) -> list[int]:
    return vocabulary(NAME).encode_text(text)


class Answers:
    """Gives the prepared answers, one list of new ids for each row and round; each id's logprob is its place's."""

    def __init__(self, *rounds: list[list[int]], truncated: list[list[bool]] | None = None) -> None:
        self.rounds = list(rounds)
        self.truncated = truncated
        self.batches: list[Any] = []
        self.logprobs = True

    def generate(self, batch: Any) -> Any:
        lengths = batch["input_lengths"].tolist()
        prompts = [row[:n] for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        new = self.rounds[len(self.batches)]
        truncated = None if self.truncated is None else self.truncated[len(self.batches)]
        self.batches.append(batch)
        logprobs = [[-(n + i) / 8 for i in range(len(ids))] for n, ids in zip(lengths, new, strict=True)]
        output = padded_output(dict, prompts, new, logprobs, pad_id=EOS, truncated=truncated)
        return output if self.logprobs else {k: v for k, v in output.items() if k != "logprobs"}


def engine(policy: Any, **options: Any) -> PolicyEngine:
    return PolicyEngine(policy, tokenizer(NAME), **options)


def opened(policy: Any, *prompts: str, stop: str = "</code>", **options: Any) -> tuple[PolicyEngine, list[int]]:
    one = engine(policy, **options)
    requests = [RowRequest(tuple(ids_of(text)), stop_strings=(stop,)) for text in prompts]
    return one, [handle for request in requests for handle in one.open(request)]


def test_it_is_an_engine() -> None:
    one = engine(Answers())
    assert isinstance(one, Engine)
    assert one.capabilities == Capabilities(logprobs="raw", sampling=False, set_weights=True, rounds=True)
    assert (one.context_length, one.eos_ids, one.weight_version, one.step()) == (None, {EOS}, 0, [])


def test_a_round_asks_for_the_running_rows_alone_and_pads_on_the_right() -> None:
    script = ids_of("<code>1</code>")
    policy = Answers([script, [5, EOS]], [[7, EOS]])
    one, (a, b) = opened(policy, "first prompt of two", "Q")
    first = one.step()
    width = len(ids_of("first prompt of two"))
    assert policy.batches[0]["input_ids"].shape == (2, width)
    assert policy.batches[0]["input_ids"][1].tolist() == [*ids_of("Q"), *[EOS] * (width - 1)]
    assert policy.batches[0]["input_lengths"].tolist() == [width, 1]
    assert policy.batches[0]["stop_strings"] == [["</code>"], ["</code>"]]
    assert [list(update.ids) for update in first] == [script, [5, EOS]]
    assert first[0].logprobs[0] == -width / 8
    assert [(update.exhausted, update.finished) for update in first] == [(False, False), (False, True)]
    one.rollback(a, 0)
    assert one.step() == []
    one.extend(a, [1, 2])
    one.close(b)
    one.set_weights(4, keep_cache=False)
    second = one.step()
    assert policy.batches[1]["input_ids"].tolist() == [[*ids_of("first prompt of two"), *script, 1, 2]]
    assert [(list(update.ids), update.weight_version) for update in second] == [([7, EOS], 4)]


def test_what_is_rolled_back_is_not_given_to_the_policy_again() -> None:
    policy = Answers([[*ids_of("<code>1</code>"), 8, 9]], [[EOS]])
    one, (row,) = opened(policy, "Q")
    one.step()
    one.rollback(row, 2)
    one.extend(row, [1])
    one.step()
    assert policy.batches[1]["input_ids"].tolist() == [[*ids_of("Q<code>1</code>"), 1]]


@pytest.mark.parametrize(
    ("new", "truncated", "exhausted", "finished"),
    [
        ([5, 6], True, True, False),
        ([5, 6], False, False, True),  # the policy has a stop id of its own
        ([5, 6], None, True, False),  # nothing ended it, so a limit did
        ([5, EOS], None, False, True),
        ([], None, True, False),
        ([], False, True, False),
        (ids_of("x</code>"), None, False, False),
        (ids_of("x</code>"), False, False, False),
        (ids_of("x</code>"), True, True, False),
        (ids_of("x</code> more"), None, False, False),  # overshoot
        (ids_of("x HALT"), None, False, False),  # the stop string of another row
    ],
)
def test_how_a_round_ended_for_a_row(new: list[int], truncated: bool | None, exhausted: bool, finished: bool) -> None:
    policy = Answers([new, ids_of("HALT")], truncated=None if truncated is None else [[truncated, False]])
    one = engine(policy)
    one.open(RowRequest((1, 2), stop_strings=("</code>",)))
    one.open(RowRequest((3,), stop_strings=("HALT",)))
    update = one.step()[0]
    assert (update.exhausted, update.finished, update.error) == (exhausted, finished, None)
    assert one.truncated_rows == ({0} if truncated else set())


def test_a_stop_string_may_begin_before_the_round_that_completes_it_but_not_end_there() -> None:
    policy = Answers([ids_of("a HALT"), [9, EOS]], [ids_of(" and more")])
    one = engine(policy)
    one.open(RowRequest((1,), stop_strings=("</code>",)))
    (b,) = one.open(RowRequest((2,), stop_strings=("HALT",)))
    assert not one.step()[0].exhausted
    one.close(b)
    one.open(RowRequest((3,), stop_strings=("HALT",)))
    policy.rounds[1] = [ids_of(" and more"), [EOS]]
    assert one.step()[0].exhausted  # "HALT" ended the round before, so a limit ended this one

    policy = Answers([ids_of("x</co")], [ids_of("de>")], truncated=[[False], [False]])
    one, (row,) = opened(policy, "Q")
    assert one.step()[0].finished
    one.rollback(row, 0)
    one.extend(row, ())
    assert not one.step()[0].finished


def test_logprobs_that_one_round_lacks_are_not_passed_off_as_complete() -> None:
    policy = Answers([ids_of("</code>")], [ids_of("</code>")], [[EOS]])
    one, _ = opened(policy, "Q")
    one.step()
    assert one.capabilities.logprobs == "raw"
    policy.logprobs = False
    assert set(one.step()[0].logprobs) == {0.0}
    policy.logprobs = True
    one.step()
    assert one.capabilities.logprobs is None


def test_what_it_cannot_do_is_told() -> None:
    one, (row,) = opened(Answers(), "Q")
    with pytest.raises(errors.CapabilityError, match="cannot fork"):
        one.fork(row, 1)
    one.rollback(row, 0)
    with pytest.raises(errors.CapabilityError, match="no media"):
        one.extend(row, [1], [Media("image/png", b"")])
    for call in (lambda: one.extend(9, []), lambda: one.rollback(9, 0), lambda: one.close(9)):
        with pytest.raises(errors.ProtocolError, match="no row 9 is open"):
            call()
    one.shutdown()
    one.shutdown()
    assert one.step() == []


def test_failures_of_the_policy_are_kept_as_they_are() -> None:
    class Failing:
        def generate(self, batch: Any) -> Any:
            raise error

    error = ValueError("mine")
    one, _ = opened(Failing(), "Q")
    with pytest.raises(ValueError, match="mine"):
        one.step()
    assert one.failure is error


def test_samples_of_one_prompt_are_rows_of_their_own_and_keys_go_by_the_order_of_opening() -> None:
    policy = Answers([[EOS], [EOS]])
    batch = {"input_ids": torch.tensor([[1], [2]]), "kept": torch.tensor([10, 20]), "whole": "text", "few": [1]}
    one = engine(policy, input_batch=batch)
    one.open(RowRequest((1,)), 2)
    one.step()
    assert policy.batches[0]["kept"].tolist() == [10, 20]
    assert (policy.batches[0]["whole"], policy.batches[0]["few"]) == ("text", [1])


def test_the_pad_id_is_the_tokenizers_own_else_its_eos_else_zero() -> None:
    assert default_pad_id(tokenizer("qwen")) == tokenizer("qwen").pad_token_id
    assert default_pad_id(tokenizer(NAME)) == EOS
    assert default_pad_id(tokenizer("tagged")) == 0
    policy = Answers([[EOS], [EOS]])
    one = engine(policy, pad_id=77)
    one.open(RowRequest((1,)))
    one.open(RowRequest((1, 2, 3)))
    one.step()
    assert policy.batches[0]["input_ids"][0].tolist() == [1, 77, 77]
