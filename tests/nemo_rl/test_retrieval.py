"""Search between turns."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType
from typing import Any

import pytest

from midstream.errors import ConfigurationError
from midstream.integrations.nemo_rl import RAGEnvironment

from .standing_in import asks, contents, metadata

TEXTS = ["Cats purr and sleep.", "Dogs bark.", "Purr, purr: a cats' song about cats."]


@pytest.fixture(scope="module")
def environment() -> RAGEnvironment:
    return RAGEnvironment({"num_results": 2}, documents=TEXTS)


def test_what_is_found_comes_numbered(environment: RAGEnvironment) -> None:
    returned = environment.step(asks("<retrieve>bark</retrieve>\n", "<retrieve>cats purr</retrieve>"), [{}, metadata()])
    assert contents(returned) == [
        "<result>\n<1>\nDogs bark.\n</1>\n</result>\n",
        f"<result>\n<1>\n{TEXTS[2]}\n</1>\n<2>\n{TEXTS[0]}\n</2>\n</result>\n",
    ]
    assert returned.metadata == [{}, metadata()]
    assert returned.next_stop_strings == [["</retrieve>"], ["</retrieve>"]]
    assert returned.terminateds.tolist() == [True, True]
    assert returned.rewards.tolist() == [0.0, 0.0]
    assert returned.answers is None


def test_what_has_no_word_in_common_is_not_a_result(environment: RAGEnvironment) -> None:
    assert contents(environment.step(asks("<retrieve>xylophone</retrieve>"), [{}])) == ["<result>\n</result>\n"]


def test_a_message_without_a_query_is_told_so(environment: RAGEnvironment) -> None:
    returned = environment.step(asks("nothing", "<retrieve>dogs"), [{}, {}])
    assert contents(returned) == ["No retrieval query found!"] * 2
    assert returned.terminateds.all()


def test_of_two_queries_the_first_is_answered(environment: RAGEnvironment) -> None:
    text = "<retrieve>bark</retrieve> or <retrieve>purr</retrieve>"
    assert contents(environment.step(asks(text), [{}])) == ["<result>\n<1>\nDogs bark.\n</1>\n</result>\n"]


async def test_searches_leave_the_event_loop_free(environment: RAGEnvironment) -> None:
    entered = asyncio.Event()
    loop = asyncio.get_running_loop()
    held: Any = environment._retriever
    answer = held.answer

    def slow(queries: Any) -> Any:
        # The search can only end once the loop has run: it would wait here for ever on the loop's own thread.
        asyncio.run_coroutine_threadsafe(_set(entered), loop).result(60)
        return answer(queries)

    held.answer = slow
    try:
        returned = await environment.step_async(asks("<retrieve>bark</retrieve>"), [{}])
    finally:
        del held.answer
    assert entered.is_set()
    assert "Dogs bark." in contents(returned)[0]


async def _set(event: asyncio.Event) -> None:
    event.set()


def test_the_batch_and_its_metrics_are_left_alone(environment: RAGEnvironment) -> None:
    batch = {"extra_env_info": [{}]}
    assert environment.global_post_process_and_metrics(batch) == (batch, {})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_results": 0}, "num_results=0"),
        ({"b": 2}, "b=2"),
        ({"device": "cuda"}, "device='cuda'"),
        ({"results": 1}, "results: unknown"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        RAGEnvironment(config, documents=TEXTS)
    with pytest.raises(ConfigurationError, match="has no 'dataset_name'"):
        RAGEnvironment({"num_results": 1})


@pytest.mark.parametrize(
    ("config", "missing", "said"),
    [
        ({"num_results": 0}, None, "num_results=0"),
        ({"k1": -1.0}, None, "k1=-1"),
        ({"device": "cuda"}, None, "device='cuda'"),
        ({}, "bm25s", r"needs bm25s: pip install 'midstream\[retrieval\]'"),
        ({}, "datasets", "dataset_name: needs datasets: pip install datasets"),
    ],
)
def test_the_data_set_is_loaded_once_nothing_else_is_wrong(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], missing: str | None, said: str
) -> None:
    loaded: list[tuple[str, str]] = []

    class Rows(dict[str, list[str]]):
        column_names = ("body",)

    def load_dataset(name: str, *, split: str) -> Rows:
        loaded.append((name, split))
        return Rows(body=TEXTS)

    datasets = ModuleType("datasets")
    vars(datasets)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    of_data_set = {"dataset_name": "some/texts", "dataset_split": "train", "text_column": "body"}
    returned = RAGEnvironment(of_data_set).step(asks("<retrieve>bark</retrieve>"), [{}])
    assert contents(returned) == ["<result>\n<1>\nDogs bark.\n</1>\n</result>\n"]
    with pytest.raises(ConfigurationError, match="text_column='text': must be one of body"):
        RAGEnvironment({**of_data_set, "text_column": "text"})
    assert loaded == [("some/texts", "train")] * 2
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigurationError, match=said):
        RAGEnvironment({**of_data_set, **config})
    assert len(loaded) == 2
