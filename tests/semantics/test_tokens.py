"""Rules 1-5: whose ids are whose."""

from __future__ import annotations

import pytest

from midstream.decoding import decode
from midstream.errors import ConfigurationError, PromptError, ProtocolError
from midstream.markup import Markup
from midstream.row import Row
from midstream.types import ExecutionResult, Limits, Message, Prompt, Sampling, StopKind, StopReason
from tests.rows import drive, logprob_at, new_row
from tests.spoken import spoken
from tests.synthetic import CLOSE, EOS, OPEN, PAD, Cutter
from tests.vocabularies import ALL, own_decoding, tokenizer, vocabulary

TRICKY = [
    "7",
    "[1, 2]",
    "x\ny",
    "  two spaces in front",
    "\n\nnewlines in front, and behind\n",
    "\ttab",
    "naïve 数学 🙂",
    "def f(x):\n        return x",
]
SPECIAL = ["</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>"]
SPECIAL += ["<tool_call>", "</tool_call>", "[INST]", "[TOOL_CALLS]", "<EOT>", "<eos>", "<|eom|>"]


# --- rule 1


def test_rule_01_prompt_ids_come_from_the_caller_and_are_never_changed() -> None:
    known = vocabulary("o200k")
    one_by_one = tuple(i for character in "Write <code> here: </code>." for i in known.encode_text(character))
    assert list(one_by_one) != known.encode_text("Write <code> here: </code>.")
    row = Row(Prompt(ids=one_by_one), known, limits=Limits())
    run = drive(row, known.encode_text("<code>1</code>"), {"1": "1"})
    assert run.trajectory.prompt_ids == one_by_one
    assert tuple(run.trajectory.ids[: len(one_by_one)]) == one_by_one


def test_rule_01_ids_that_are_no_integers_are_refused_and_not_rounded() -> None:
    with pytest.raises(ConfigurationError, match=r"Prompt\.ids"):
        Prompt(ids=(1, 2.5))


def test_rule_01_a_text_is_encoded_once_as_the_tokenizer_encodes_a_prompt() -> None:
    assert new_row(vocabulary("mistral1"), "Hello").prompt_ids[0] == tokenizer("mistral1").bos_id()
    assert new_row(vocabulary("llama_fast"), "Hello").prompt_ids == tuple(tokenizer("llama_fast").encode("Hello"))
    special = new_row(vocabulary("o200k"), "a<|endoftext|>b").prompt_ids
    assert vocabulary("o200k").added_id("<|endoftext|>") in special


def test_rule_01_messages_are_rendered_once_by_the_chat_template() -> None:
    prompt = Prompt(messages=(Message("user", "Add 3 and 4."),))
    row = new_row(vocabulary("qwen"), prompt)
    expected = tokenizer("qwen").encode("<|im_start|>user\nAdd 3 and 4.<|im_end|>\n<|im_start|>assistant\n")
    assert list(row.prompt_ids) == expected
    with pytest.raises(PromptError, match="no chat template"):
        new_row(vocabulary("o200k"), prompt)


def test_rule_01_impossible_prompts_are_refused() -> None:
    known = vocabulary("tagged")
    for prompt, message in [
        (Prompt(ids=()), "is empty"),
        (Prompt(ids=(-1,), id="p7"), "prompt 'p7' holds id -1"),
        (Prompt(ids=(0, known.size)), f"holds id {known.size}"),
    ]:
        with pytest.raises(PromptError, match=message):
            new_row(known, prompt)


# --- rule 2


@pytest.mark.parametrize("name", ALL)
def test_rule_02_generated_ids_are_never_changed(name: str) -> None:
    ids = spoken(name, "We add: <code>3 + 4</code>x = 7. <code>y = 1</code>\n\nAnd <code>\n5\n</code>\n\n\nDone.")
    run = drive(new_row(vocabulary(name)), ids, {"3 + 4": "7", "\n5\n": "5"}, chunks=[1, 4, 2])
    kept = [i for segment in run.trajectory.segments if segment.origin == "generated" for i in segment.ids]
    assert kept == ids


@pytest.mark.parametrize("name", ["o200k", "cl100k", "qwen", "llama4"])
def test_rule_02_the_token_that_completes_an_end_tag_is_kept_whole(name: str) -> None:
    known = vocabulary(name)
    ids = spoken(name, "<code>1</code>x")
    assert known.piece(ids[-1]) == b">x"
    run = drive(new_row(known), ids, {"1": "1"})
    assert run.text == "<code>1</code>x<result>1</result>"
    assert run.row.records[0].call.lookahead == "x"


def test_rule_02_ids_after_a_closing_token_are_left_out_and_counted() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary)
    ids = cutter.cut("<code>", "1", "</code>x", "over", "shoot")
    received = row.receive(ids, [-1.0, -2.0, -3.0, -4.0, -5.0])
    assert received.accepted == 3
    row.inject(ExecutionResult("1"))
    trajectory = row.trajectory
    assert trajectory.text == "<code>1</code>x<result>1</result>"
    assert trajectory.segments[0].logprobs == (-1.0, -2.0, -3.0)
    assert trajectory.discarded == 2


def test_rule_02_overshoot_behind_a_silent_block_is_left_out_too() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary)
    run = drive(row, cutter.cut("<code>", "a=1", "</code>", " and", " on"), {}, chunks=[5])
    assert run.text == "<code>a=1</code> and on"
    assert run.trajectory.discarded == 2  # said twice, taken once


def test_rule_02_ids_behind_the_end_of_a_row_are_left_out_and_counted() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary)
    assert row.receive([*cutter.cut("a", "b"), EOS, EOS, PAD, PAD], [-1.0] * 6).accepted == 3
    assert row.trajectory.discarded == 3
    assert row.trajectory.ids[-1] == EOS


def test_rule_02_a_row_out_of_turn_is_an_error() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary)
    with pytest.raises(ProtocolError, match="2 ids but 1 logprobs"):
        row.receive([1, 2], [0.0])
    with pytest.raises(ProtocolError, match="inject: the row is generating"):
        row.inject()
    row.receive(cutter.cut("<code>1</code>"), [0.0])
    with pytest.raises(ProtocolError, match="receive: the row is executing"):
        row.receive([1], [0.0])
    with pytest.raises(ProtocolError, match="0 results for 1 pending"):
        row.inject()
    row.stop(StopReason(StopKind.CANCELLED))
    with pytest.raises(ProtocolError, match="inject: the row is stopped"):
        row.inject()


# --- rule 3


@pytest.mark.parametrize("name", ALL)
def test_rule_03_frame_and_payload_are_encoded_in_one_call(name: str) -> None:
    known = vocabulary(name)
    for payload in TRICKY:
        run = drive(new_row(known), spoken(name, "<code>f()</code>"), {"f()": payload})
        framed = f"\n\n<result>\n{payload}\n</result>" if "\n" in payload else f"<result>{payload}</result>"
        assert list(run.trajectory.segments[-1].ids) == known.encode_text(framed), payload


def test_rule_03_together_is_not_the_same_as_apart() -> None:
    known = vocabulary("o200k")
    run = drive(new_row(known), spoken("o200k", "<code>f()</code>"), {"f()": "[1, 2]"})
    apart = [i for part in ("<result>", "[1, 2]", "</result>") for i in known.encode_text(part)]
    assert len(run.trajectory.segments[-1].ids) == 10
    assert len(apart) == 12


def test_rule_03_results_that_follow_one_another_are_encoded_in_one_call() -> None:
    cutter = Cutter(whole=True)
    run = drive(new_row(cutter.vocabulary), cutter.cut("<code>1</code><code>2</code>"), {"1": "1", "2": "2"})
    assert list(run.trajectory.segments[-1].ids) == cutter.cut("<result>1</result><result>2</result>")


@pytest.mark.parametrize("name", ALL)
def test_rule_03_nothing_is_put_in_front_of_a_result_or_behind_it(name: str) -> None:
    known = vocabulary(name)
    for payload in TRICKY:
        run = drive(new_row(known), spoken(name, "<code>f()</code>"), {"f()": payload})
        framed = f"\n\n<result>\n{payload}\n</result>" if "\n" in payload else f"<result>{payload}</result>"
        assert run.trajectory.segments[-1].text == framed


@pytest.mark.parametrize("name", ALL)
def test_rule_03_a_result_has_no_space_in_front_for_its_tokenizer_either(name: str) -> None:
    """A tokenizer of SentencePiece's kind puts a space before every text that it encodes."""
    said, ids = "So <code>f()</code>", spoken(name, "So <code>f()</code>")
    for payload in ("7", "seven", "'text'", "None", "[1, 2]"):
        run = drive(new_row(vocabulary(name)), ids, {"f()": payload})
        generated = run.trajectory.ids[len(run.trajectory.prompt_ids) :]
        assert own_decoding(name, generated) == f"{said}<result>{payload}</result>"


@pytest.mark.parametrize("name", ALL)
def test_rule_03_special_tokens_that_a_snippet_prints_are_plain_text(name: str) -> None:
    known = vocabulary(name)
    added = sorted(known.piece(token_id).decode() for token_id in known.added_ids)
    printed = [*SPECIAL, *added[:40], " ".join(added[:40]), f"a{SPECIAL[0]}b{SPECIAL[1]}\n"]
    for text in printed:
        run = drive(new_row(known), spoken(name, "<code>f()</code>"), {"f()": text})
        injected = run.trajectory.segments[-1]
        assert text in injected.text
        assert known.added_ids.isdisjoint(injected.ids), text
        for ids in (injected.ids, known.encode_text(text)):
            assert not [i for i in ids if known.piece(i).decode(errors="replace") in SPECIAL], text


def test_rule_03_added_tokens_that_are_not_special_are_plain_text_too() -> None:
    known = vocabulary("qwen")
    inner = tokenizer("qwen")
    assert inner.encode("<tool_call>", split_special_tokens=True) == [known.added_id("<tool_call>")]
    assert known.added_id("<tool_call>") not in known.encode_text("<tool_call>")
    assert len(known.encode_text("<tool_call>")) > 1


@pytest.mark.parametrize("name", ["metaspace", "unigram"])
def test_rule_03_newlines_that_a_vocabulary_lists_as_added_are_text_all_the_same(name: str) -> None:
    known = vocabulary(name)
    newline = known.encode_text("\n")
    assert len(newline) == 1
    assert known.piece(newline[0]) == b"\n"
    # … and a text with newlines is still encoded in one call, not character by character
    text = "The sum of 3 and 4 is\nthe lines go on"
    assert len(known.encode_text(text)) < 2 / 3 * len(text)
    assert decode(known, known.encode_text(text)) == text


def test_rule_03_special_tokens_that_the_markup_means_are_their_ids() -> None:
    cutter = Cutter()
    markup = Markup.tags("<code>", "<|result|>", special_result=True)
    run = drive(new_row(cutter.vocabulary, markup=markup), cutter.cut("<code>f()</code>"), {"f()": "<|result|>"})
    injected = run.trajectory.segments[-1].ids
    assert injected == (OPEN, *b"<|result|>", CLOSE)


# --- rule 4


def test_rule_04_mask_logprobs_and_versions_say_which_ids_were_sampled() -> None:
    cutter = Cutter()
    ids = cutter.cut("<code>", "f()", "</code>", "so", EOS)
    run = drive(new_row(cutter.vocabulary, "Q"), ids, {"f()": "7"}, versions=lambda place: 5 if place < 2 else 6)
    trajectory = run.trajectory
    injected = len("<result>7</result>")
    assert trajectory.mask == [0] + [1] * 3 + [0] * injected + [1] * 2
    assert trajectory.logprobs == [0.0, *map(logprob_at, range(3)), *[0.0] * injected, *map(logprob_at, [3, 4])]
    assert trajectory.weight_versions == [-1, 5, 5, 6, *[-1] * injected, 6, 6]
    lengths = {len(x) for x in (trajectory.ids, trajectory.mask, trajectory.logprobs, trajectory.weight_versions)}
    assert lengths == {trajectory.total_length}


def test_rule_04_a_logprob_of_exactly_0_is_a_generated_id_like_any() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary, "Q")
    row.receive(cutter.cut("a", "b", "c"), [0.0, -1.5, 0.0])
    assert row.trajectory.logprobs == [0.0, 0.0, -1.5, 0.0]
    assert row.trajectory.mask == [0, 1, 1, 1]


def test_rule_04_the_trajectory_says_what_its_logprobs_are() -> None:
    cutter = Cutter()
    sampling = Sampling(temperature=0.7, top_p=0.9)
    row = Row(Prompt(text="Q"), cutter.vocabulary, sampling=sampling, logprob_kind="processed")
    assert row.trajectory.logprob_kind == "processed"
    assert row.trajectory.sampling == sampling


# --- rule 5


def test_rule_05_lengths_are_counts_also_where_eos_is_the_pad_id() -> None:
    cutter = Cutter()
    prompt = Prompt(ids=(EOS, EOS, *b"Q:", EOS))
    run = drive(new_row(cutter.vocabulary, prompt), [*cutter.cut("<code>f()</code>"), *b"so", EOS], {"f()": "7"})
    trajectory = run.trajectory
    assert trajectory.prompt_ids == prompt.ids
    assert trajectory.generation_length == 1 + len("<result>7</result>") + 2 + 1
    assert trajectory.total_length == len(prompt.ids or ()) + trajectory.generation_length == len(trajectory.ids)
    assert trajectory.stop == StopReason(StopKind.END_OF_SEQUENCE, str(EOS))


def test_rule_05_an_ignored_eos_is_an_id_like_any() -> None:
    cutter = Cutter()
    row = new_row(cutter.vocabulary, "Q", ignore_eos=True, max_new_tokens=5)
    run = drive(row, [EOS, *b"a", EOS, EOS, *b"b", *b"c"])
    assert run.trajectory.generation_length == 5
    assert run.trajectory.mask == [0, 1, 1, 1, 1, 1]
    assert run.trajectory.stop == StopReason(StopKind.LENGTH, "new_tokens")


def test_rules_01_to_05_hold_with_no_markup_at_all() -> None:
    known = vocabulary("o200k")
    ids = spoken("o200k", "<code>1</code> is text here")
    run = drive(new_row(known, markup=None), ids)
    assert list(run.trajectory.segments[0].ids) == ids
    assert run.codes == []
