"""What is asked of a server before the first row: which route gives ids and logprobs, and of what kind these are.

One request for at most :data:`PROBED` greedy ids of a short prompt to each route until one fits, two requests for
one sampled id each (unless the kind of logprobs is given), and what the server tells of itself by ``GET /v1/models``
and ``GET /get_model_info``. Where it has ``POST /detokenize``, it is asked for the text of ids spread over the
vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from midstream.decoding import decode
from midstream.engines.server.asking import Asking, Patience
from midstream.engines.server.asks import Ask, Fault, FaultKind, GaveUp, Piece, Unauthorized
from midstream.engines.server.client import Client
from midstream.engines.server.connection import ServerConnection
from midstream.engines.server.routes import Route, SGLangGenerate, TextCompletions, VLLMCompletions, VLLMGenerate
from midstream.errors import CapabilityError, ConfigurationError, EngineError, TokenizerError
from midstream.types import LogprobKind, Sampling
from midstream.vocabulary import Vocabulary

RouteName = Literal["auto", "vllm-completions", "vllm-generate", "sglang", "text"]

PROBED = 8
_PROMPT = "1 + 1 ="
_RETRIES = 2
"""So many at most: whoever names a server that is not there is told soon."""

_SPREAD = 64
"""Ids whose text is compared."""

_EQUAL = 0.02
"""How far apart the logprobs of one id may lie that were computed twice; a temperature of 0.5 moves them further."""


@dataclass(frozen=True, slots=True)
class Found:
    """A route, and what is known of the server behind it.

    ``model``: the name to ask for, where it is known. ``weight_version``: as it tells, or None.
    """

    route: Route
    model: str | None
    context_length: int | None
    logprobs: LogprobKind | None
    weight_version: int | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller says of the server."""

    route: RouteName
    model: str | None
    logprobs: LogprobKind | None
    stream: bool
    eos_ids: frozenset[int]


def check_route(name: str) -> None:
    if name not in get_args(RouteName):
        known = ", ".join(map(repr, get_args(RouteName)))
        raise ConfigurationError(f"route={name!r}: must be one of {known}")


async def probe(client: Client, connection: ServerConnection, vocabulary: Vocabulary, wanted: Wanted) -> Found:
    """Raises :class:`CapabilityError` for a server that lacks what rows need, :class:`TokenizerError` for another
    tokenizer than its model's, :class:`ConfigurationError` for a model that it does not serve, and
    :class:`EngineError` where it cannot be reached.
    """
    connection = replace(connection, retries=min(connection.retries, _RETRIES))
    try:
        return await _Probe(client, connection, vocabulary, wanted).find()
    except Fault as fault:
        raise EngineError(f"{client.url}: {fault}") from fault


class _Probe:
    def __init__(self, client: Client, connection: ServerConnection, vocabulary: Vocabulary, wanted: Wanted) -> None:
        self._client = client
        self._connection = connection
        self._vocabulary = vocabulary
        self._wanted = wanted
        self._ids = tuple(vocabulary.encode_text(_PROMPT))

    async def find(self) -> Found:
        served = await self._served()
        name = self._wanted.route
        model = self._wanted.model
        if served is not None and name != "sglang":
            model = _chosen(model, served)
        context = _context((served or {}).get(str(model)))
        if name == "text":
            texts = TextCompletions(model, self._vocabulary, self._wanted.eos_ids)
            await self._answer(texts)
            return Found(texts, model, context, None, None)
        info = await self._sglang()
        if name == "auto":
            names: Sequence[str] = ("vllm-completions", "vllm-generate") if info is None else ("sglang",)
        else:
            names = (name,)
        lacking = []
        for candidate in names:
            route = _route(candidate, model, info)
            try:
                answer = await self._answer(route)
            except Fault as fault:
                if fault.kind is not FaultKind.FINAL or isinstance(fault, Unauthorized | GaveUp):
                    raise
                lacking.append(f"POST {route.path}: {fault}")
                continue
            await self._check_vocabulary(answer)
            if candidate == "sglang":
                context = (info or {}).get("context_length") or context
            return Found(route, model, context, await self._logprob_kind(route), answer.version)
        raise CapabilityError(
            f"{self._client.url} gives no ids and logprobs for ids, which rows need to be exact: {'; '.join(lacking)}. "
            "For evaluation alone, text_only=True takes servers that give only text"
        )

    async def _served(self) -> dict[str, Any] | None:
        """The models that the server names, by their ids; None where it names none."""
        patience = Patience(self._connection)
        while True:
            try:
                status, found = await self._client.get("/v1/models")
                break
            except Fault as fault:
                await asyncio.sleep(patience.wait_after(fault))
        cards = found.get("data") if status == 200 and isinstance(found, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            return None
        return {str(card["id"]): card for card in cards} or None

    async def _sglang(self) -> dict[str, Any] | None:
        """What an SGLang server tells of itself; None for any other server."""
        status, info = await self._client.get("/get_model_info")
        if status != 200 or not isinstance(info, dict) or "model_path" not in info:
            return None
        status, arguments = await self._client.get("/get_server_info")
        return {**info, **(arguments if status == 200 and isinstance(arguments, dict) else {})}

    async def _answer(self, route: Route, sampling: Sampling | None = None, most: int = PROBED) -> Piece:
        """All of an answer in one piece, with the logprobs of the likeliest ids behind the prompt."""
        seed = None if sampling is None else 1
        ask = Ask(
            self._ids,
            sampling or Sampling(temperature=0.0),
            seed,
            most,
            stream=self._wanted.stream,
            alternatives=0 if sampling is None else 5,
        )
        clash = sorted(set(route.body(replace(ask, seed=1))) & set(self._connection.body))
        if clash:
            raise ConfigurationError(f"ServerConnection.body: holds {', '.join(clash)}, which the engine itself sets")
        pieces = []
        async with aclosing(Asking(self._client, route, self._connection).pieces(ask)) as answer:
            async for piece in answer:
                pieces.append(piece)  # noqa: PERF401  # mypy knows no async comprehension over this
        texts = [piece.text for piece in pieces if piece.text is not None]
        return Piece(
            tuple(i for piece in pieces for i in piece.ids),
            tuple(x for piece in pieces for x in piece.logprobs),
            "".join(texts) if texts else None,
            pieces[-1].finish,
            next((piece.version for piece in pieces if piece.version is not None), None),
            pieces[0].likeliest,
        )

    async def _logprob_kind(self, route: Route) -> LogprobKind:
        """Logprobs that a temperature moves are of what was sampled from, not of the model."""
        if self._wanted.logprobs is not None:
            return self._wanted.logprobs
        plain = await self._answer(route, Sampling(), 1)
        sharpened = await self._answer(route, Sampling(temperature=0.5), 1)
        pairs = list(zip(plain.likeliest, sharpened.likeliest, strict=False))
        if not pairs:
            raise CapabilityError(
                f"{self._client.url}: gives no logprobs of the likeliest ids, by which the kind of its logprobs would "
                "be known: say logprobs='raw' (under the model as it is) or 'processed' (after the temperature)"
            )
        return "raw" if all(abs(one - other) <= _EQUAL for one, other in pairs) else "processed"

    async def _check_vocabulary(self, answer: Piece) -> None:
        """Raises :class:`TokenizerError` where ids stand for another text on the server than here."""
        size = self._vocabulary.size
        highest = max(answer.ids, default=0)
        if highest >= size:
            raise TokenizerError(
                f"tokenizer: is another than that of the model at {self._client.url}: it sampled id {highest}, and "
                f"this tokenizer's ids are under {size}"
            )
        if answer.text is not None:
            # Servers differ in whether the text has the id that ended the answer.
            ended = answer.finish != "length"
            self._compare(answer.ids[:-1] if ended else answer.ids, answer.text, begins=ended)
        ids = self._spread()
        for body in ({"tokens": ids}, {"tokens": ids, "model": self._wanted.model}):
            status, found = await self._client.post("/detokenize", body)
            if status == 200 and isinstance(found, dict):
                text = found.get("prompt", found.get("text"))
                if isinstance(text, str):
                    self._compare(ids, text)
                return
            if status == 404 or self._wanted.model is None:
                return

    def _spread(self) -> list[int]:
        """Ids from all over the vocabulary that stand for ordinary text."""
        size = self._vocabulary.size
        found = []
        for part in range(_SPREAD):
            ids = range(part * size // _SPREAD, (part + 1) * size // _SPREAD)
            found += [next(filter(self._is_plain, ids), None)]
        return [token_id for token_id in found if token_id is not None]

    def _is_plain(self, token_id: int) -> bool:
        text = self._vocabulary.piece_text(token_id)
        return token_id not in self._vocabulary.added_ids and bool(text and text.isprintable() and text.strip())

    def _compare(self, ids: Sequence[int], theirs: str, *, begins: bool = False) -> None:
        ours = decode(self._vocabulary, ids)
        if not _agree(ours, theirs, begins=begins):
            raise TokenizerError(
                f"tokenizer: is another than that of the model at {self._client.url}: ids {list(ids)[:8]} stand for "
                f"{theirs[:60]!r} there, and for {ours[:60]!r} here"
            )


def _agree(ours: str, theirs: str, *, begins: bool) -> bool:
    """Whether two texts of the same ids are the same (or begin so), as far as servers keep to it.

    They differ in spaces (SentencePiece's first one, those that some tokenizers tidy up) and in characters that are
    not complete.
    """
    one, other = ("".join(text.partition("\ufffd")[0].split()) for text in (ours, theirs))
    if "\ufffd" in theirs:
        return one.startswith(other)
    return other.startswith(one) if begins or "\ufffd" in ours else one == other


def _route(name: str, model: str | None, info: dict[str, Any] | None) -> Route:
    match name:
        case "vllm-completions":
            return VLLMCompletions(model)
        case "vllm-generate":
            return VLLMGenerate(model)
        case _:
            return SGLangGenerate(seeded=bool((info or {}).get("enable_deterministic_inference")))


def _chosen(model: str | None, served: dict[str, Any]) -> str:
    if model is None and len(served) == 1:
        return next(iter(served))
    if model is None or model not in served:
        raise ConfigurationError(f"model={model!r}: the server has {', '.join(sorted(map(repr, served)))}; name one")
    return model


def _context(card: dict[str, Any] | None) -> int | None:
    length = (card or {}).get("max_model_len")
    return length if isinstance(length, int) and length > 0 else None
