"""What NeMo-RL's rollouts give an environment, and what they take from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from midstream.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

MessageLog = Sequence[Mapping[str, Any]]


class EnvironmentReturn(NamedTuple):
    """What a step gives, one entry a row: the fields of NeMo-RL's own, in their order.

    ``observations`` are messages, ``rewards`` float32 ``[B]``, ``terminateds`` bool ``[B]``. ``answers`` is None.

    An observation may be the empty text. NeMo-RL tokenises it, and a tokenizer may give an empty tensor of float32 for
    it, which is NeMo-RL's to turn into int64.
    """

    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[list[str]]
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list[str | None] | None


def environment_return(
    contents: Sequence[str], metadata: Sequence[Any], *, stop: str, terminated: Sequence[bool]
) -> EnvironmentReturn:
    """The answer to a step in which nothing is rewarded, and every row stops next at ``stop``."""
    import torch

    return EnvironmentReturn(
        observations=[{"role": "environment", "content": content} for content in contents],
        metadata=list(metadata),
        next_stop_strings=[[stop] for _ in contents],
        rewards=torch.zeros(len(contents), dtype=torch.float32),
        terminateds=torch.tensor(terminated, dtype=torch.bool),
        answers=None,
    )


def last_messages(logs: Sequence[MessageLog], metadata: Sequence[Any], return_extracted_answer: bool) -> list[str]:
    """The text of each log's last message. Raises ConfigurationError for a step that cannot be taken."""
    if return_extracted_answer:
        raise ConfigurationError("return_extracted_answer=True: there is no answer to extract here; leave it False")
    if len(logs) != len(metadata):
        raise ConfigurationError(f"metadata: has {len(metadata)} entries for {len(logs)} message logs")
    texts = []
    for row, log in enumerate(logs):
        if not log:
            raise ConfigurationError(f"message_log_batch[{row}]: is empty; its last message is what is acted on")
        content = log[-1].get("content")
        if not isinstance(content, str):
            raise ConfigurationError(
                f"message_log_batch[{row}][-1]['content']: is {type(content).__name__}; it must be a text"
            )
        texts.append(content)
    return texts


def checked_config(kind: str, config: Any, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    """The configuration as a dict. Raises ConfigurationError for missing and for unknown keys."""
    if not isinstance(config, Mapping):
        raise ConfigurationError(f"{kind}={config!r}: must be a mapping")
    settings = {str(key): value for key, value in config.items()}
    for key in required:
        if key not in settings:
            raise ConfigurationError(f"{kind}: has no {key!r}; it needs {', '.join(required)}")
    for key in settings:
        if key not in (*required, *optional):
            raise ConfigurationError(f"{kind}.{key}: unknown; known are {', '.join((*required, *optional))}")
    return settings
