"""What public values are held to: the field, the value and what would be right, before any work starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from midstream import Generator, Limits, Message, Prompt, Sampling, SandboxPool, errors, generate_with_code_and_tools
from tests.rollouts import scripted
from tests.vocabularies import tokenizer


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_result_tokens": None}, r"Limits.max_result_tokens=None: must be an integer of at least 1"),
        ({"max_result_characters": None}, r"Limits.max_result_characters=None: must be an integer of at least 1"),
        ({"reserve_tokens": None}, r"Limits.reserve_tokens=None: must be an integer of at least 0"),
        ({"max_new_tokens": 1.5}, r"Limits.max_new_tokens=1.5: must be an integer of at least 1, or None"),
        ({"max_new_tokens": True}, r"Limits.max_new_tokens=True: must be an integer"),
        ({"max_total_tokens": "9"}, r"Limits.max_total_tokens='9': must be an integer"),
        ({"max_tool_calls": -1}, r"Limits.max_tool_calls=-1: must be an integer of at least 0, or None"),
        ({"time_limit": float("inf")}, r"Limits.time_limit=inf: must be a number of seconds over 0, or None"),
        ({"time_limit": "1"}, r"Limits.time_limit='1': must be a number of seconds"),
        ({"time_limit": True}, r"Limits.time_limit=True: must be a number of seconds"),
        ({"at_tool_call_limit": 1}, r"Limits.at_tool_call_limit=1: must be 'tell' or 'stop'"),
        ({"count_injected": "no"}, r"Limits.count_injected='no': must be True or False"),
        ({"ignore_eos": 1}, r"Limits.ignore_eos=1: must be True or False"),
        ({"stop_strings": "stop"}, r"Limits.stop_strings='stop': must be a sequence of strings, not one str"),
        ({"stop_strings": 5}, r"Limits.stop_strings=5: must be a sequence of strings"),
        ({"stop_strings": [5]}, r"Limits.stop_strings=\(5,\): must hold non-empty strings"),
        ({"stop_ids": 5}, r"Limits.stop_ids=5: must be a sequence of token ids"),
        ({"stop_ids": "12"}, r"Limits.stop_ids='12': must be a sequence of token ids"),
        ({"stop_ids": [1.5]}, r"Limits.stop_ids\[\]=1.5: must be an integer of at least 0"),
    ],
)
def test_limits_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        Limits(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": "1"}, r"Sampling.temperature='1': must be a number of at least 0"),
        ({"temperature": None}, r"Sampling.temperature=None: must be a number of at least 0"),
        ({"temperature": float("inf")}, r"Sampling.temperature=inf: must be a number"),
        ({"top_k": None}, r"Sampling.top_k=None: must be an integer of at least 0"),
        ({"top_k": 2.5}, r"Sampling.top_k=2.5: must be an integer of at least 0"),
        ({"top_p": "1"}, r"Sampling.top_p='1': must be a number over 0"),
        ({"min_p": None}, r"Sampling.min_p=None: must be a number from 0"),
    ],
)
def test_sampling_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        Sampling(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"text": 5}, r"Prompt.text=5: must be a string"),
        ({"ids": 5}, r"Prompt.ids=5: must be a sequence of token ids"),
        ({"ids": "12"}, r"Prompt.ids='12': must be a sequence of token ids"),
        ({"ids": (1.5,)}, r"Prompt.ids: holds 1.5; token ids are integers"),
        ({"messages": 5}, r"Prompt.messages=5: must be a sequence of messages"),
        ({"messages": [5]}, r"Prompt.messages\[\]=5: must be a mapping"),
        ({"messages": {"role": "user", "content": ""}}, r"must be a sequence of messages, not one dict"),
        ({"text": "a", "id": 5}, r"Prompt.id=5: must be a string or None"),
        ({"text": "a", "group": 5}, r"Prompt.group=5: must be a string or None"),
        ({"text": "a", "metadata": 5}, r"Prompt.metadata=5: must be a mapping"),
        ({"text": "a", "metadata": {"a": object()}}, r"Prompt.metadata\['a'\]=<object .*: JSON has no object"),
        ({"text": "a", "metadata": {"a": [1, {2: 3}]}}, r"Prompt.metadata\['a'\]\[1\]=2: the keys .* are strings"),
        ({"text": "a", "metadata": {"a": float("nan")}}, r"Prompt.metadata\['a'\]=nan: must be finite"),
        ({"text": "a", "seed": "x"}, r"Prompt.seed='x': must be an integer, or None"),
        ({"text": "a", "limits": "x"}, r"Prompt.limits='x': must be Limits or None"),
        ({"text": "a", "media": 5}, r"Prompt.media=5: must be a sequence of Media"),
        ({"text": "a", "open_block": "no"}, r"Prompt.open_block='no': must be True or False"),
    ],
)
def test_prompts_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        Prompt(**options)


def test_messages_that_cannot_be() -> None:
    with pytest.raises(errors.ConfigurationError, match=r"role='robot': must be 'system', 'user'"):
        Message("robot", "")  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigurationError, match=r"content=5: must be a string"):
        Message("user", 5)  # type: ignore[arg-type]


def test_numbers_of_numpys_are_numbers() -> None:
    limits: Any = Limits(np.int64(5), time_limit=np.float32(2), stop_ids=np.array([3, 4]))
    assert (limits.max_new_tokens, limits.time_limit, limits.stop_ids) == (5, 2.0, (3, 4))
    assert type(limits.max_new_tokens) is int
    assert type(limits.time_limit) is float
    assert Sampling(np.float32(0.5), np.int32(4)) == Sampling(0.5, 4)  # type: ignore[arg-type]
    prompt: Any = Prompt(ids=np.array([1, 2]), seed=np.int64(7))
    assert (prompt.ids, prompt.seed) == ((1, 2), 7)


# --- generators, batches and pools


def never(*_: object, **__: object) -> Any:
    raise AssertionError("something was done before the arguments were looked at")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limits": 5}, "limits=5: must be Limits or None"),
        ({"limits": {}}, "limits={}: must be Limits or None"),
        ({"sampling": 5}, "sampling=5: must be Sampling or None"),
        ({"markup": "<code>"}, "markup='<code>': must be Markup or None"),
        ({"observers": 5}, "observers=5: must be a sequence of callables"),
        ({"seed": "x"}, "seed='x': must be an integer"),
        ({"pool": 5}, "pool=5: must be a SandboxPool, another Pool, or None"),
        ({"max_open_rows": True}, "max_open_rows=True: must be an integer"),
        ({"hold_sessions": "1"}, "hold_sessions='1': must be a number of seconds"),
    ],
)
def test_options_of_a_generator_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        Generator(scripted("said"), **options)


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        (5, {}, "prompts=5: must be a sequence of prompts"),
        (["a"], {"n": True}, "n=True: must be an integer of at least 1"),
        (["a"], {"reward": 5}, "reward=5: must be a function of a trajectory, or None"),
        (["a"], {"min_finished": True}, "min_finished=True: must be an integer"),
        ([{5: 1, "txt": "a"}], {}, "prompt: unknown field 5"),
    ],
)
def test_batches_that_cannot_be(prompts: Any, options: dict[str, Any], says: str) -> None:
    engine = scripted("said")
    with Generator(engine, markup=None) as generator:
        with pytest.raises(errors.ConfigurationError, match=says):
            generator.generate(prompts, **options)
        assert engine.steps == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampling": 5}, "sampling=5: must be Sampling"),
        ({"seed": "x"}, "seed='x': must be an integer, or None"),
        ({"sample": 1.5}, "sample=1.5: must be an integer of at least 0"),
        ({"session": 5}, "session=5: must be KeptSession or None"),
        ({"listener": 5}, "listener=5: must be a function"),
    ],
)
def test_submitted_rows_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with (
        Generator(scripted("said"), markup=None) as generator,
        pytest.raises(errors.ConfigurationError, match=says),
    ):
        generator.submit("a", **options)


def test_tensors_that_cannot_be() -> None:
    with Generator(scripted("said"), markup=None) as generator:
        batch = generator.generate(["a"])
    for options, says in [({"pad_id": "x"}, "pad_id='x': must be an integer"), ({"length": 9.5}, "length=9.5")]:
        with pytest.raises(errors.ConfigurationError, match=says):
            batch.to_tensors(**options)  # type: ignore[arg-type]


class _Policy:
    generate = staticmethod(never)


IDS = {"input_ids": torch.tensor([[1, 2]]), "input_lengths": torch.tensor([2])}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"policy": 5}, r"policy=5: must have a method generate\(batch\)"),
        ({"input_batch": None}, "input_batch=None: must be a dict"),
        ({"input_batch": {**IDS, "input_lengths": torch.tensor([2.0])}}, "input_lengths: holds torch.float32"),
        ({"execute_code": "no"}, "execute_code='no': must be True or False"),
        ({"limits": {}}, "limits={}: must be Limits or None"),
        ({"markup": "fenced"}, "markup='fenced': must be Markup or None"),
        ({"tag": 5}, "tag=5: must be a string"),
        ({"result_tag": 5}, "result_tag=5: must be a string"),
        ({"pool": 5}, "pool=5: must be a SandboxPool"),
    ],
)
def test_the_drop_in_refuses_what_cannot_be(options: dict[str, Any], says: str) -> None:
    given = {"policy": _Policy(), "input_batch": IDS, "tokenizer": tokenizer("o200k"), **options}
    with pytest.raises(errors.ConfigurationError, match=says):
        generate_with_code_and_tools(**given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"environment": 5}, "environment=5: must be a mapping"),
        ({"environment": []}, r"environment=\[\]: must be a mapping"),
        ({"readable": 5}, "readable=5: must be a sequence of paths"),
        ({"allow_missing": 5}, "allow_missing=5: must be a sequence of names"),
        ({"allow_missing": [[], 5]}, "allow_missing=.*the layers are"),
        ({"preload": 5}, "preload=5: must be a sequence of module names"),
        ({"observers": 5}, "observers=5: must be a sequence of callables"),
    ],
)
def test_pools_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        SandboxPool(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"history": 5}, "history=5: must be a sequence of blocks"),
        ({"history": [5]}, r"history\[0\]=5: must be a block's code and its ExecutionResult"),
        ({"history": [("1", 5)]}, r"history\[0\]=\('1', 5\): must be a block's code"),
        ({"tools": 5}, "tools=5: must be a mapping or a sequence of names"),
        ({"call_tool": 5}, "call_tool=5: must be a function"),
        ({"seed": -7}, "seed=-7: must be an integer of at least 0"),
    ],
)
def test_sessions_that_cannot_be(options: dict[str, Any], says: str) -> None:
    pool = SandboxPool()
    pool.start = pool.start_process = never  # type: ignore[method-assign]
    with pytest.raises(errors.ConfigurationError, match=says):
        pool.session(**options)
