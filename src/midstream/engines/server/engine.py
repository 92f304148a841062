"""An engine over a server: rows are asked for with all of their ids, and every id is the server's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from midstream import checks
from midstream.engines.base import Capabilities
from midstream.engines.rows import check_integer, checked_eos_ids
from midstream.engines.server.asking import Asking
from midstream.engines.server.asks import Fault, FaultKind, GaveUp, Unauthorized
from midstream.engines.server.client import Client, base_url, warn_of_plain_key
from midstream.engines.server.connection import ServerConnection
from midstream.engines.server.link import ServerLink
from midstream.engines.server.probe import RouteName, Wanted, check_route, probe
from midstream.engines.server.requests import RequestEngine
from midstream.engines.server.routes import unsupported
from midstream.engines.server.scoring import PATH, Scored, read_scored, score_body
from midstream.errors import CapabilityError, ConfigurationError, EngineError
from midstream.types import LogprobKind, Sampling
from midstream.vocabulary import Vocabulary


class ServerEngine(RequestEngine):
    """Samples by asking a server that takes prompt ids and gives back ids and logprobs (vLLM's and SGLang's routes).

    A row goes on after a result as a new request with all of its ids, which the server's prefix cache knows; rows
    that wait for code take no place there.

    - ``url``: the server's, with or without ``/v1``.
    - ``tokenizer``: the model's; held against the server's texts of ids.
    - ``model``: by the name that the server serves it under; None where it serves one alone.
    - ``route``: ``"vllm-completions"`` (``/v1/completions``), ``"vllm-generate"`` (``/inference/v1/generate``),
      ``"sglang"`` (``/generate``), or ``"auto"``, the first of them that gives ids and logprobs.
    - ``text_only``: for evaluation over a server that gives only text (``/v1/completions``): ids are then made here of
      its text, there are no logprobs, and trajectories are marked as not fit for training.
    - ``stream``: ids come as they are sampled, so that a row may be ended at any of them, and a lost connection loses
      none that came. Otherwise an answer comes whole.
    - ``stop_strings``: the server itself ends an answer at the row's end tag and stop strings. Where an answer runs on
      instead, what lies behind is cut by its ids. Off for servers that see no text (``--tokens-only``).
    - ``logprobs``: the kind that the server gives; None finds it out.
    - ``context_length``: the most ids of a row, if fewer than the server says, or where it says nothing.
    - ``eos_ids``: by default the tokenizer's. What else ends a sequence for the server ends the row too.
    - ``weight_version``: of the weights that the server has, where it does not tell a number itself.
    - ``connection``: keys, headers, certificates, deadlines, and what is asked again after a fault.

    Sampling noise is the server's own, under a seed for each request. The constructor asks the server what it can
    (:mod:`midstream.engines.server.probe`). A fault that cannot be mended ends its row alone, which keeps what it has.

    Raises :class:`~midstream.errors.CapabilityError` for a server that lacks what rows need, naming it;
    :class:`~midstream.errors.ConfigurationError` for what cannot be, another model's tokenizer among it;
    :class:`~midstream.errors.EngineError` where the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        model: str | None = None,
        route: RouteName = "auto",
        text_only: bool = False,
        stream: bool = True,
        stop_strings: bool = True,
        logprobs: LogprobKind | None = None,
        context_length: int | None = None,
        eos_ids: Iterable[int] | None = None,
        weight_version: int = 0,
        connection: ServerConnection | None = None,
    ) -> None:
        checks.instance("connection", connection, ServerConnection, optional=True)
        connection = connection or ServerConnection()
        url = base_url(url)
        check_route(route)
        if text_only and (route not in ("auto", "text") or not stream):
            raise ConfigurationError(
                "text_only=True: goes by /v1/completions and stream=True alone; leave route and stream as they are"
            )
        if logprobs not in (None, "raw", "processed"):
            raise ConfigurationError(f"logprobs={logprobs!r}: must be 'raw', 'processed' or None")
        if context_length is not None and (not isinstance(context_length, int) or context_length < 2):
            raise ConfigurationError(f"context_length={context_length!r}: must be an integer of at least 2")
        vocabulary = Vocabulary.of(tokenizer)
        ends = vocabulary.eos_ids if eos_ids is None else checked_eos_ids(eos_ids)
        check_integer("weight_version", weight_version, 0)
        warn_of_plain_key(url, connection)
        _need_client()
        link = ServerLink(partial(Client, url, connection))
        try:
            wanted = Wanted("text" if text_only else route, model, logprobs, stream, ends)
            found = link.within(probe(link.client, connection, vocabulary, wanted))
            self._route = found.route
            self._logprobs = found.logprobs
            self._served = found.model
            self._beside = link.beside
            link.asking = self._asking = Asking(link.client, found.route, connection)
            lengths = [length for length in (found.context_length, context_length) if length is not None]
            super().__init__(
                tokenizer,
                link,
                context_length=min(lengths, default=None),
                eos_ids=ends,
                weight_version=weight_version if found.weight_version is None else found.weight_version,
                vocabulary_size=vocabulary.size,
                asks_stop_ids=found.route.exact,
                asks_stop_strings=stop_strings and found.route.exact,
                stream=stream,
            )
        except BaseException:
            link.shutdown()
            raise

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(logprobs=self._logprobs, exact_ids=self._route.exact, fork=True)

    @property
    def weight_version(self) -> int:
        """The version of ids that come without one. To be set when the server's weights have changed."""
        return self._weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._weight_version = version

    async def score(self, prompt: str | Sequence[int], fields: Mapping[str, Any]) -> Scored:
        """What the server says of a prompt that it is given, by ``/v1/completions`` with ``echo``, whatever the rows'
        route is. Nothing is added to ``fields``, those of the request besides, of which ``max_tokens`` is one.

        May be awaited in any event loop. It takes one of the places of ``ServerConnection.max_requests``, and what
        fails is asked again as a greedy row is. Raises :class:`~midstream.errors.CapabilityError` for a server that
        refuses it or does not score; :class:`~midstream.errors.EngineError` for one that fails.
        """

        def read(answer: Any) -> Scored:
            return read_scored(answer, prompt, fields["max_tokens"])

        body = score_body(self._served, prompt, fields)
        try:
            return await self._beside(self._asking.whole(PATH, body, read))
        except Fault as fault:
            refused = fault.kind is FaultKind.FINAL and not isinstance(fault, GaveUp | Unauthorized)
            raise (CapabilityError if refused else EngineError)(f"POST {PATH}: {fault}") from fault

    def _unsupported(self, sampling: Sampling) -> str | None:
        return unsupported(sampling, self._route)

    def set_weights(self, version: int, *, keep_cache: bool) -> None:
        del keep_cache
        raise CapabilityError(
            f"set_weights: a server's weights and caches cannot be changed from here; once it has weights {version}, "
            f"set this engine's weight_version between two batches (the Hugging Face and vLLM engines take new ones)"
        )


def _need_client() -> None:
    from importlib.util import find_spec

    if find_spec("httpx2") is None:
        raise ConfigurationError("ServerEngine needs httpx2: pip install 'midstream[server]'")
