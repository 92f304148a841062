"""Search over documents as a turn of NeMo-RL's rollouts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, Self, TypedDict

from midstream.errors import ConfigurationError
from midstream.integrations.nemo_rl.interface import (
    EnvironmentReturn,
    MessageLog,
    checked_config,
    environment_return,
    last_messages,
)
from midstream.tools.retrieval import Retriever

_QUERY = re.compile(r"<retrieve>(.*?)</retrieve>", re.DOTALL)
NO_QUERY = "No retrieval query found!"


class RAGEnvConfig(TypedDict):
    """NeMo-RL's own. Only the data set's three are needed; ``device`` can only be the CPU, where the index is."""

    dataset_name: str
    dataset_split: str
    text_column: str
    num_results: NotRequired[int]
    k1: NotRequired[float]
    b: NotRequired[float]
    device: NotRequired[str]


class RAGEnvironment:
    """Answers ``<retrieve>query</retrieve>`` with the texts that fit best; then the rollout is over.

    - ``config``: :class:`RAGEnvConfig`. The data set is loaded with ``datasets``; the index is that of
      :class:`~midstream.tools.retrieval.Retriever`, which needs ``midstream[retrieval]``.
    - ``documents``: texts to search in place of the data set.

    A query that nothing fits gets an empty result, never texts that have no word in common with it.
    """

    def __init__(self, config: RAGEnvConfig | Mapping[str, Any], *, documents: Iterable[str] | None = None) -> None:
        of_data_set = ("dataset_name", "dataset_split", "text_column")
        options = ("num_results", "k1", "b", "device")
        if documents is None:
            settings = checked_config("RAGEnvConfig", config, of_data_set, options)
        else:
            settings = checked_config("RAGEnvConfig", config, (), (*of_data_set, *options))
        if settings.get("device", "cpu") != "cpu":
            raise ConfigurationError(f"RAGEnvConfig.device={settings['device']!r}: must be 'cpu', where the index is")
        self._retriever = Retriever(
            _texts(settings) if documents is None else documents,
            num_results=settings.get("num_results", 10),
            k1=settings.get("k1", 1.5),
            b=settings.get("b", 0.75),
        )

    def step(
        self,
        message_log_batch: Sequence[MessageLog],
        metadata: Sequence[Any],
        return_extracted_answer: bool = False,
    ) -> EnvironmentReturn:
        """Search for the first query in each row's last message, all rows at once."""
        texts = last_messages(message_log_batch, metadata, return_extracted_answer)
        matches = [_QUERY.search(text) for text in texts]
        answers = iter(self._retriever.answer([match.group(1) for match in matches if match is not None]))
        contents = [NO_QUERY if match is None else _result(next(answers)) for match in matches]
        return environment_return(contents, metadata, stop="</retrieve>", terminated=[True] * len(contents))

    async def step_async(
        self,
        message_log_batch: Sequence[MessageLog],
        metadata: Sequence[Any],
        return_extracted_answer: bool = False,
    ) -> EnvironmentReturn:
        """The same for asyncio; the loop goes on meanwhile."""
        return await asyncio.to_thread(self.step, message_log_batch, metadata, return_extracted_answer)

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The batch as it is, and no metrics."""
        return batch, {}

    def shutdown(self) -> None:
        """There is nothing to end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _texts(settings: Mapping[str, Any]) -> Iterator[str]:
    # Loaded when the first text is asked for: by then the other settings have been checked.
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigurationError("RAGEnvConfig.dataset_name: needs datasets: pip install datasets") from error

    rows = load_dataset(settings["dataset_name"], split=settings["dataset_split"])
    column = settings["text_column"]
    if column not in rows.column_names:
        raise ConfigurationError(f"RAGEnvConfig.text_column={column!r}: must be one of {', '.join(rows.column_names)}")
    yield from rows[column]


def _result(texts: Sequence[str]) -> str:
    numbered = "".join(f"<{number}>\n{text}\n</{number}>\n" for number, text in enumerate(texts, 1))
    return f"<result>\n{numbered}</result>\n"
