"""What public values are held to: the field, the value and what would be right, before any work starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from midstream import Limits, Message, Prompt, Sampling, errors


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
