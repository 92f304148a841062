"""What engines refuse of what they are given: by its name, before anything is asked, loaded or sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from midstream import PolicyEngine, RowRequest, ServerConnection, ServerEngine, errors
from midstream.engines.rows import RowKeeper
from midstream.engines.vllm.engine import VLLMEngine
from tests.rollouts import scripted
from tests.vocabularies import tokenizer


class _Policy:
    def generate(self, batch: Any) -> Any:
        raise AssertionError("nothing is to be sampled")


def server(**options: Any) -> Any:
    return ServerEngine("http://127.0.0.1:1", tokenizer("o200k"), **options)


def policy(**options: Any) -> Any:
    return PolicyEngine(_Policy(), tokenizer("o200k"), **options)


@pytest.mark.parametrize("make", [server, policy])
@pytest.mark.parametrize(
    ("eos_ids", "says"),
    [
        (2, "eos_ids=2: must be a sequence of token ids"),
        ("</s>", "eos_ids='</s>': must be a sequence of token ids"),
        (["</s>"], r"eos_ids\[\]='</s>': must be an integer of at least 0"),
    ],
)
def test_ids_that_end_a_sequence(make: Callable[..., Any], eos_ids: Any, says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        make(eos_ids=eos_ids)


def test_what_every_engine_that_keeps_rows_is_held_to() -> None:
    with pytest.raises(errors.ConfigurationError, match="weight_version='a': must be an integer"):
        RowKeeper[Any](None, context_length=None, eos_ids=(), weight_version="a")  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigurationError, match="weight_version='a': must be an integer"):
        server(weight_version="a")
    assert RowKeeper[Any](None, context_length=None, eos_ids=np.array([2])).eos_ids == {2}


@pytest.mark.parametrize("ids", [(1.5, 2), ("a",), (None,)])
def test_rows_start_from_integers(ids: Any) -> None:
    for engine in (scripted("said"), policy()):
        with pytest.raises(errors.PromptError, match=r"ids: holds .*; token ids are integers"):
            engine.open(RowRequest(ids))
        assert engine.open_rows == 0
    (handle,) = scripted("said").open(RowRequest((np.int64(1), 2)))  # type: ignore[arg-type]
    assert handle == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"headers": "x"}, "ServerConnection.headers: is str; must be a mapping"),
        ({"headers": {"x": 5}}, r"ServerConnection.headers\['x'\]: is int; names and values must be strings"),
        ({"api_key": 3}, "ServerConnection.api_key: is int; must be a string or None"),
        ({"body": 5}, "ServerConnection.body=5: must be a mapping"),
        ({"tls": True}, "ServerConnection.tls=True: must be SSLContext or None"),
    ],
)
def test_connections_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        ServerConnection(**options)


def test_a_connection_is_one() -> None:
    with pytest.raises(errors.ConfigurationError, match=r"connection={}: must be ServerConnection or None"):
        server(connection={})


def test_a_policys_batch_has_a_row_for_each_that_is_opened() -> None:
    one = policy(input_batch={"input_ids": torch.tensor([[1], [2]]), "name": ["a", "b"]})
    one.open(RowRequest((1,)))
    with pytest.raises(errors.PromptError, match="input_batch: has 2 rows, and 3 were opened"):
        one.open(RowRequest((1,)), 2)
    one.close(*one.open(RowRequest((1,))))
    with pytest.raises(errors.PromptError, match="input_batch: has 2 rows, and 3 were opened"):
        one.open(RowRequest((1,)))


def test_a_policy_can_generate() -> None:
    with pytest.raises(errors.ConfigurationError, match=r"policy=5: must have a method generate\(batch\)"):
        PolicyEngine(5, tokenizer("o200k"))
    with pytest.raises(errors.ConfigurationError, match="input_batch=5: must be a mapping"):
        policy(input_batch=5)


@pytest.mark.parametrize("mode", ["resubmission", "streaming", "forced"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patience": -1}, "patience=-1: must be a number of seconds, 0 or more"),
        ({"patience": "1"}, "patience='1': must be a number of seconds"),
        ({"patience": float("nan")}, "patience=nan: must be a number of seconds"),
        ({"eos_ids": 2}, "eos_ids=2: must be a sequence of token ids"),
        ({"weight_version": "a"}, "weight_version='a': must be an integer"),
        ({"context_length": 1}, "context_length=1: must be an integer of at least 2"),
    ],
)
def test_vllm_is_not_started_with_what_cannot_be(mode: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=says):
        VLLMEngine(object(), mode=mode, **options)
    with pytest.raises(errors.ConfigurationError, match=says):
        VLLMEngine.from_pretrained("nowhere", mode=mode, **options)
