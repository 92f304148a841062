"""A client for a server that says what it is told, as verl's agent loop workers have one for theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from midstream.decoding import decode
from midstream.vocabulary import Vocabulary


@dataclass
class Answer:
    """What the server sampled for a row, behind so many ids."""

    position: int
    ids: list[int]
    logprobs: list[float] = field(default_factory=list)


class ServedRows:
    """Goes on with each row behind its prompt: with the first of its texts, and after each result with the next.

    - ``texts``: by the prompt's text. ``overshoot``: ids of what follows that come with an answer, as where a server
      does not see stop strings. ``abort_at``: an answer's number → how many of its ids come before it is aborted.
    - ``at_answer``: called with the prompt's text before each answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Mapping[str, Sequence[str]],
        *,
        overshoot: int = 0,
        abort_at: Mapping[int, int] | None = None,
        at_answer: Callable[[str], None] | None = None,
    ) -> None:
        self.vocabulary = Vocabulary.of(tokenizer)
        self.eos = min(self.vocabulary.eos_ids)
        self.texts = dict(texts)
        self.overshoot = overshoot
        self.abort_at = dict(abort_at or {})
        self.at_answer = at_answer
        self.answers: dict[str, list[Answer]] = {text: [] for text in texts}
        self.parameters: list[dict[str, Any]] = []
        self.sessions: set[str] = set()
        self.version = 0
        self.under_way = 0

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_options: Any
    ) -> TokenOutput:
        self.under_way += 1
        try:
            await asyncio.sleep(0)
            return self._answer(request_id, prompt_ids, sampling_params)
        finally:
            self.under_way -= 1

    def _answer(self, request_id: str, prompt_ids: list[int], parameters: dict[str, Any]) -> TokenOutput:
        self.sessions.add(request_id)
        self.parameters.append(dict(parameters))
        text = decode(self.vocabulary, prompt_ids)
        prompt = max((known for known in self.texts if text.startswith(known)), key=len)
        if self.at_answer is not None:
            self.at_answer(prompt)
        said = "".join(decode(self.vocabulary, answer.ids) for answer in self._kept(prompt, prompt_ids))
        ids = self._rest(self.texts[prompt], said)
        stop = [stop for stop in parameters["stop"] if stop in decode(self.vocabulary, ids)]
        for count in range(1, len(ids)):
            if any(each in decode(self.vocabulary, ids[:count]) for each in stop):
                ids = ids[: count + self.overshoot]
                break
        ids = ids[: parameters["max_tokens"]]
        number = sum(len(answers) for answers in self.answers.values())
        aborted = number in self.abort_at
        if aborted:
            ids = ids[: self.abort_at[number]]
        answer = Answer(len(prompt_ids), ids, [-(1 + (len(prompt_ids) + place) % 7) / 8 for place in range(len(ids))])
        self.answers[prompt].append(answer)
        self.version += aborted
        return TokenOutput(
            token_ids=ids,
            log_probs=answer.logprobs if parameters["logprobs"] else None,
            stop_reason="aborted" if aborted else "completed",
            extra_fields={"global_steps": self.version - aborted},
        )

    def _kept(self, prompt: str, ids: Sequence[int]) -> list[Answer]:
        """The answers that stand in ``ids``, without what came late."""
        kept = []
        for answer in self.answers[prompt]:
            there = 0
            while there < len(answer.ids) and list(ids)[answer.position + there : answer.position + there + 1] == [
                answer.ids[there]
            ]:
                there += 1
            kept.append(Answer(answer.position, answer.ids[:there]))
        return kept

    def _rest(self, texts: Sequence[str], said: str) -> list[int]:
        for text in texts:
            if not said.startswith(text):
                assert text.startswith(said)
                break
            said = said[len(text) :]
        else:
            return [self.eos]
        ids = [*self.vocabulary.encode_text(text[len(said) :])]
        return [*ids, self.eos] if text is texts[-1] else [*ids, *self.vocabulary.encode_text(texts[-1])]
