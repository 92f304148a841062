"""``generate_with_code_and_tools``: the worked examples to the letter, and everything that it promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from midstream import FENCED_PYTHON, Limits, SandboxPool, errors, generate_with_code_and_tools
from tests.drop_in import EOS, ids_of, run, texts
from tests.policies import BatchedDataDict, ScriptedPolicy, input_batch, policy_logprob
from tests.rollouts import VOCABULARY
from tests.vocabularies import tokenizer

KINDS = [dict, BatchedDataDict]
RETRIEVED = (
    "Nvidia was established in 1993 by Jen-Hsun Huang, Curtis Priem, and Chris Malachowsky. It is an American "
    "technology company."
)
SHOWN = (
    "['Nvidia was established in 1993 by Jen-Hsun Huang, Curtis Priem, and Chris '\n"
    " 'Malachowsky. It is an American technology company.']"
)

# What the model writes, piece by piece, and what is injected behind each piece.
EXAMPLES: dict[str, Sequence[tuple[str, str]]] = {
    "silent": [
        ("<code>x = 3; y = 4</code>\nThis is some regular text.\n<code>x + y</code>", "<result>7</result>"),
        (" So 7.", ""),
    ],
    "block": [
        ("<code>\ndef f(x):\n    return x * x\n\nf(2)\n</code>\n", "\n<result>\n4\n</result>"),
        (" That is 4.", ""),
    ],
    "retrieve": [("<code>retrieve('Jen-Hsun Huang')</code>", f"\n\n<result>\n{SHOWN}\n</result>"), (" I see.", "")],
    "print": [("<code>print(5)</code>", "<result>5</result>"), (" fine", "")],
    "error": [("<code>1/0</code>", "<result>ZeroDivisionError('division by zero')</result>"), (" oops", "")],
    "adjacent": [("<code>a=1</code><code>a+1</code><", "result>2</result>"), ("code>a+2</code>.", "")],
}


def cut(pieces: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The ids of the pieces of an example, each cut as the vocabulary cuts it."""
    return [ids_of(written) for written, _ in pieces]


@pytest.mark.parametrize("tells_truncated", [True, False])
@pytest.mark.parametrize("overshoot", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_worked_examples_to_the_letter(
    sandboxes: SandboxPool, kind: Any, overshoot: int, tells_truncated: bool
) -> None:
    scripts = {name: [i for piece in cut(pieces) for i in piece] for name, pieces in EXAMPLES.items()}
    output, _ = run(
        scripts,
        sandboxes,
        kind=kind,
        policy={"overshoot": overshoot, "tells_truncated": tells_truncated},
        tool_map={"retrieve": lambda query: [RETRIEVED] if "Huang" in query else []},
    )
    assert type(output) is kind
    eos = "<|endoftext|>"
    assert texts(output) == ["".join(a + b for a, b in pieces) + eos for pieces in EXAMPLES.values()]
    assert texts(output, of="injected") == ["".join(b for _, b in pieces) for pieces in EXAMPLES.values()]
    assert not output["truncated"].any()
    # The generated ids are the policy's own, one for one, and each logprob belongs to its place.
    for index, script in enumerate(scripts.values()):
        mask = output["token_mask"][index].bool()
        assert output["output_ids"][index][mask].tolist() == [*script, EOS]
        places = mask.nonzero().flatten().tolist()
        assert output["logprobs"][index][mask].tolist() == [policy_logprob(place) for place in places]
        assert not output["logprobs"][index][~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_keys_shapes_and_dtypes_as_the_policys_own(sandboxes: SandboxPool, kind: Any) -> None:
    output, policy = run({"a": ids_of("<code>1</code> x"), "b": ids_of("text")}, sandboxes, kind=kind)
    own = ScriptedPolicy(tokenizer(VOCABULARY), policy.scripts, kind).generate(policy.calls[0])
    assert set(output) == set(own) | {"token_mask"}
    width = output["output_ids"].shape[1]
    for key, value in own.items():
        assert output[key].dtype == value.dtype, key
        assert output[key].shape == ((2, width) if value.ndim == 2 else (2,)), key
    assert output["token_mask"].dtype == torch.int64
    assert output["token_mask"].shape == (2, width)


def test_prompts_are_untouched_and_lengths_are_counts_though_padding_is_eos(sandboxes: SandboxPool) -> None:
    prompts = [[EOS, 5, EOS, EOS], [9, 9]]  # EOS inside and at the end of a prompt
    policy = ScriptedPolicy(tokenizer(VOCABULARY), {"a": [*ids_of("<code>1</code> x"), EOS], "b": [5, EOS]})
    given = input_batch(dict, prompts, pad_id=EOS, name=["a", "b"])
    output = generate_with_code_and_tools(policy, given, tokenizer(VOCABULARY), pool=sandboxes)
    for index, prompt in enumerate(prompts):
        assert output["output_ids"][index, : len(prompt)].tolist() == prompt
        assert not output["token_mask"][index, : len(prompt)].any()
    assert output["generation_lengths"][1] == 2
    assert (output["unpadded_sequence_lengths"] - output["generation_lengths"]).tolist() == [4, 2]
    assert texts(output)[0] == "<code>1</code><result>1</result> x<|endoftext|>"


def test_other_keys_go_along_row_by_row(sandboxes: SandboxPool) -> None:
    scripts = {"a": ids_of("text"), "b": ids_of("<code>1</code> <code>2</code> x"), "c": ids_of("<code>3</code>")}
    extra = {
        "tensor": torch.tensor([10, 20, 30]),
        "matrix": torch.arange(6).reshape(3, 2),
        "array": np.array([[1.5], [2.5], [3.5]]),
        "list": ["first", {"second": 2}, None],
        "tuple": ("x", "y", "z"),
    }
    _, policy = run(scripts, sandboxes, batch=extra)
    order = list(scripts)
    assert len(policy.calls) > 2
    for batch in policy.calls:
        rows = [order.index(name) for name in batch["name"]]
        assert batch["tensor"].tolist() == [(row + 1) * 10 for row in rows]
        assert batch["matrix"].tolist() == [[2 * row, 2 * row + 1] for row in rows]
        assert batch["array"].tolist() == [[row + 1.5] for row in rows]
        assert batch["list"] == [extra["list"][row] for row in rows]  # type: ignore[index]
        assert batch["tuple"] == tuple("xyz"[row] for row in rows)
    assert [len(batch["name"]) for batch in policy.calls][:1] == [3]
    assert policy.calls[-1]["name"] == ["b"]


def test_arguments_go_to_the_policy_in_every_round(sandboxes: SandboxPool) -> None:
    policy = ScriptedPolicy(tokenizer(VOCABULARY), {"a": [*ids_of("<code>1</code> x"), EOS]})
    given = input_batch(dict, [ids_of("Q")], name=["a"])
    generate_with_code_and_tools(
        policy, given, tokenizer(VOCABULARY), True, {}, "<code>", "<result>", "first", 2, greedy=True, pool=sandboxes
    )
    assert policy.options == [(("first", 2), {"greedy": True})] * 2


def test_the_callers_batch_is_not_changed(sandboxes: SandboxPool) -> None:
    given = input_batch(BatchedDataDict, [ids_of("Q")], name=["a"], stop_strings=[["END"]])
    before = {key: value.clone() if isinstance(value, torch.Tensor) else list(value) for key, value in given.items()}
    policy = ScriptedPolicy(tokenizer(VOCABULARY), {"a": ids_of("<code>1</code> END")}, BatchedDataDict)
    generate_with_code_and_tools(policy, given, tokenizer(VOCABULARY), pool=sandboxes)
    assert list(given) == list(before)
    for key, value in before.items():
        assert torch.equal(given[key], value) if isinstance(value, torch.Tensor) else given[key] == value


# --- stopping


def test_a_rows_own_stop_string_ends_it_and_another_rows_does_not(sandboxes: SandboxPool) -> None:
    scripts = {
        "a": ids_of("one HALT two STOP three"),
        "b": ids_of("one STOP two HALT three <code>6*7</code> four"),
        "c": ids_of("STOP HALT <code>1</code> five"),
    }
    for tells_truncated in (True, False):
        output, _ = run(
            scripts,
            sandboxes,
            batch={"stop_strings": [["HALT"], ["three"], None]},
            policy={"tells_truncated": tells_truncated},
        )
        assert texts(output) == [
            "one HALT",
            "one STOP two HALT three",
            "STOP HALT <code>1</code><result>1</result> five<|endoftext|>",
        ]
        assert not output["truncated"].any()


@pytest.mark.parametrize("stop_strings", [["HALT"], [["HALT"], ["HALT"]], [("HALT",), None], None, []])
def test_stop_strings_come_one_list_for_all_or_one_for_each_row(sandboxes: SandboxPool, stop_strings: Any) -> None:
    scripts = {"a": ids_of("one HALT two"), "b": ids_of("no <code>1</code> end")}
    output, _ = run(scripts, sandboxes, batch={"stop_strings": stop_strings})
    halted = bool(stop_strings)
    assert texts(output)[0] == ("one HALT" if halted else "one HALT two<|endoftext|>")
    assert texts(output)[1] == "no <code>1</code><result>1</result> end<|endoftext|>"


def test_a_stop_string_behind_the_end_tag_in_its_token_stops_after_the_result(sandboxes: SandboxPool) -> None:
    output, _ = run({"a": ids_of("<code>1</code>\nmore")}, sandboxes, batch={"stop_strings": [[">\n"]]})
    assert texts(output) == ["<code>1</code>\n<result>1</result>"]
    assert not output["truncated"].any()


def test_truncated_is_set_where_any_round_was(sandboxes: SandboxPool) -> None:
    scripts = {"long": ids_of("word " * 50), "short": ids_of("word"), "code": ids_of("<code>1</code> x")}
    output, _ = run(scripts, sandboxes, policy={"max_new_tokens": 20})
    assert output["truncated"].tolist() == [True, False, False]
    assert output["generation_lengths"][0] == 20
    untold, _ = run(scripts, sandboxes, policy={"max_new_tokens": 20, "tells_truncated": False})
    assert untold["truncated"].tolist() == [True, False, False]


def test_a_round_that_was_truncated_behind_a_block_marks_its_row_too(sandboxes: SandboxPool) -> None:
    class Overshooting(ScriptedPolicy):
        def generate(self, batch: Any, *arguments: Any, **options: Any) -> Any:
            output = super().generate(batch)
            output["truncated"][:] = len(self.calls) == 1  # at its limit, far behind the end tag
            return output

    policy = Overshooting(tokenizer(VOCABULARY), {"a": [*ids_of("<code>1</code> and the end"), EOS]}, overshoot=3)
    output = generate_with_code_and_tools(policy, input_batch(dict, [[5]], name=["a"]), tokenizer(VOCABULARY),
                                          pool=sandboxes)  # fmt: skip
    assert texts(output) == ["<code>1</code><result>1</result> and the end<|endoftext|>"]
    assert output["truncated"].tolist() == [True]


def test_our_own_limits_truncate_too(sandboxes: SandboxPool) -> None:
    scripts = {"a": ids_of("word " * 50), "b": ids_of("<code>1</code> <code>2</code> <code>3</code>")}
    limits = Limits(max_new_tokens=30, max_tool_calls=1, at_tool_call_limit="stop")
    output, _ = run(scripts, sandboxes, limits=limits)
    assert output["truncated"].tolist() == [True, True]
    assert output["generation_lengths"][0] == 30
    assert texts(output)[1] == "<code>1</code><result>1</result> <code>2</code>"


def test_without_limits_of_ours_only_the_policys_hold(sandboxes: SandboxPool) -> None:
    script = ids_of("<code>print('x' * 100)</code> go on " * 40)
    output, _ = run({"a": script}, sandboxes)
    assert int(output["generation_lengths"][0]) > len(script)
    assert not output["truncated"].any()


# --- options


def test_execute_code_off_runs_nothing_and_looks_for_no_tags() -> None:
    called: list[int] = []
    text = "<code>touch()</code> and <code>1</code>"
    scripts = {"a": ids_of(text)}
    output, policy = run(scripts, None, execute_code=False, tool_map={"touch": lambda: called.append(1)})
    assert texts(output) == [text + "<|endoftext|>"]
    assert called == []
    assert len(policy.calls) == 1
    assert output["token_mask"].sum() == output["generation_lengths"][0]


def test_other_tags_and_markups(sandboxes: SandboxPool) -> None:
    output, _ = run(
        {"a": ids_of("<code>1</code> <python>2</python> x")}, sandboxes, tag="<python>", result_tag="<output>"
    )
    assert texts(output) == ["<code>1</code> <python>2</python><output>2</output> x<|endoftext|>"]
    output, _ = run({"a": ids_of("So:\n```python\n6 * 7\n```\nYes.")}, sandboxes, markup=FENCED_PYTHON)
    assert texts(output, of="injected") == ["```output\n42\n```\n"]


def test_a_policy_without_logprobs_gives_none(sandboxes: SandboxPool) -> None:
    output, _ = run({"a": ids_of("<code>1</code> x")}, sandboxes, policy={"gives_logprobs": False})
    assert "logprobs" not in output
    assert texts(output) == ["<code>1</code><result>1</result> x<|endoftext|>"]


def test_a_pool_is_started_and_ended_where_none_is_given() -> None:
    output, _ = run({"a": ids_of("<code>1</code> x")}, None)
    assert texts(output) == ["<code>1</code><result>1</result> x<|endoftext|>"]


def test_the_policy_runs_in_the_callers_torch_context(sandboxes: SandboxPool) -> None:
    seen: list[tuple[bool, bool]] = []

    class Asking(ScriptedPolicy):
        def generate(self, batch: Any, *arguments: Any, **options: Any) -> Any:
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return super().generate(batch)

    def ask() -> None:
        policy = Asking(tokenizer(VOCABULARY), {"a": [5, EOS]})
        generate_with_code_and_tools(policy, input_batch(dict, [[5]], name=["a"]), tokenizer(VOCABULARY),
                                     execute_code=False)  # fmt: skip

    ask()
    with torch.no_grad():
        ask()
    with torch.inference_mode():
        ask()
    assert seen == [(True, False), (False, False), (False, True)]


# --- bad input


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"input_lengths": torch.tensor([1])}, "has no 'input_ids'"),
        ({"input_ids": torch.tensor([[1]])}, "has no 'input_lengths'"),
        ({"input_ids": [[1]], "input_lengths": torch.tensor([1])}, "input_batch.input_ids: is list"),
        ({"input_ids": torch.tensor([1]), "input_lengths": torch.tensor([1])}, r"must be \[B, S\] and \[B\]"),
        ({"input_ids": torch.tensor([[1]]), "input_lengths": torch.tensor([[1]])}, r"must be \[B, S\] and \[B\]"),
        ({"input_ids": torch.tensor([[1]]), "input_lengths": torch.tensor([2])}, r"input_lengths\[0\]=2"),
        ({"input_ids": torch.tensor([[1]]), "input_lengths": torch.tensor([0])}, r"input_lengths\[0\]=0"),
        ({"stop_strings": "STOP"}, "must be a list for each row"),
        ({"stop_strings": [["a"], ["b"]]}, "has 2 entries for 1 rows"),
        ({"stop_strings": [[3]]}, r"stop_strings\[0\]=\[3\]"),
        ({"stop_strings": [[""]]}, "non-empty strings"),
    ],
)
def test_a_batch_that_is_not_so_is_refused(batch: dict[str, Any], says: str) -> None:
    given = batch if "stop_strings" not in batch else input_batch(dict, [[1]], **batch)
    policy = ScriptedPolicy(tokenizer(VOCABULARY), {})
    with pytest.raises(errors.ConfigurationError, match=says):
        generate_with_code_and_tools(policy, given, tokenizer(VOCABULARY), execute_code=False)
    assert policy.calls == []


def test_tags_that_cannot_work_are_refused() -> None:
    with pytest.raises(errors.MarkupError, match="give its end tag too"):
        run({"a": [5]}, None, tag="code")


def test_an_empty_batch_goes_to_the_policy_as_it_is() -> None:
    class Empty:
        def generate(self, batch: Any, *, greedy: bool) -> Any:
            return {"batch": batch, "greedy": greedy}

    given = {"input_ids": torch.zeros(0, 3, dtype=torch.int64), "input_lengths": torch.zeros(0, dtype=torch.int64)}
    output = generate_with_code_and_tools(Empty(), given, tokenizer(VOCABULARY), greedy=True)
    assert output["batch"] is given
    assert output["greedy"] is True


# --- bad output


class Wrong(ScriptedPolicy):
    def __init__(self, change: Any) -> None:
        super().__init__(tokenizer(VOCABULARY), {"a": [5, 6, EOS], "b": [7, EOS]})
        self.change = change

    def generate(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        output = super().generate(batch)
        return self.change(output)


def without(key: str) -> Any:
    return lambda output: {name: value for name, value in output.items() if name != key}


def changed(**values: Any) -> Any:
    return lambda output: {**output, **{name: change(output[name]) for name, change in values.items()}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda output: None, "gave NoneType; it must give a mapping"),
        (without("output_ids"), "has no 'output_ids'"),
        (without("generation_lengths"), "has no 'generation_lengths'"),
        (without("unpadded_sequence_lengths"), "has no 'unpadded_sequence_lengths'"),
        (changed(output_ids=lambda x: x + 1), "input ids changed"),
        (changed(output_ids=lambda x: x[:1]), "its output_ids has 1 rows for 2"),
        (changed(output_ids=lambda x: x[:, :2]), "output_ids has 2 columns"),
        (changed(output_ids=lambda x: "ids"), "its output_ids is str"),
        (changed(generation_lengths=lambda x: x + 1), "input_lengths . generation_lengths = 2 . 4"),
        (changed(generation_lengths=lambda x: x[:1]), "its generation_lengths has 1 rows"),
        (
            changed(generation_lengths=lambda x: x - 9, unpadded_sequence_lengths=lambda x: x - 9),
            "unpadded_sequence_lengths=-4",
        ),
        (changed(logprobs=lambda x: x[:, :3]), "logprobs has 3 columns"),
        (changed(truncated=lambda x: x[:1]), "its truncated has 1 rows"),
    ],
)
def test_an_output_that_is_not_so_is_named(change: Any, says: str) -> None:
    given = input_batch(dict, [[1, 2], [3]], pad_id=EOS, name=["a", "b"])
    with pytest.raises(errors.EngineError, match=f"^policy.generate: .*{says}"):
        generate_with_code_and_tools(Wrong(change), given, tokenizer(VOCABULARY), execute_code=False)


@pytest.mark.parametrize("error", [ValueError("mine"), RuntimeError("CUDA out of memory"), StopIteration("odd"),
                                   AssertionError("batch must be a BatchedDataDict")])  # fmt: skip
@pytest.mark.parametrize("in_round", [1, 2])
def test_what_the_policy_raises_comes_through_as_it_is(sandboxes: SandboxPool, error: Exception, in_round: int) -> None:
    class Failing(ScriptedPolicy):
        def generate(self, batch: Any, *arguments: Any, **options: Any) -> Any:
            if len(self.calls) + 1 == in_round:
                raise error
            return super().generate(batch)

    policy = Failing(tokenizer(VOCABULARY), {"a": [*ids_of("<code>1</code> x"), EOS]})
    with pytest.raises(type(error)) as caught:
        generate_with_code_and_tools(policy, input_batch(dict, [[5]], name=["a"]), tokenizer(VOCABULARY),
                                     pool=sandboxes)  # fmt: skip
    assert caught.value is error
