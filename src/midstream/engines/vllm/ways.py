"""Which way rows go on after a result, and what each needs of vLLM to be exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from midstream.engines.vllm.direct import DirectLink
from midstream.engines.vllm.facts import PROCESSOR_V1, Facts
from midstream.engines.vllm.forced import Forced
from midstream.engines.vllm.looped import LoopLink
from midstream.engines.vllm.resubmission import Resubmission
from midstream.engines.vllm.streaming import Streaming
from midstream.errors import CapabilityError, ConfigurationError
from midstream.vocabulary import Vocabulary

if TYPE_CHECKING:
    from midstream.engines.vllm.opening import Connection

Mode = Literal["resubmission", "streaming", "forced"]


def check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        wanted = ", ".join(repr(known) for known in get_args(Mode))
        raise ConfigurationError(f"mode={mode!r}: must be one of {wanted}")


def way_of(connection: Connection, facts: Facts, mode: Mode, *, stop_strings: bool, patience: float) -> Resubmission:
    """Raises :class:`CapabilityError` where this vLLM cannot go that way exactly."""
    if stop_strings:
        _check_stop_strings(facts, mode)
    if mode == "streaming":
        return Streaming(_session_link(connection, facts), facts, Vocabulary.of(connection.tokenizer))
    if mode == "forced":
        _check_forced(connection, facts)
        return Forced(connection.link, facts, stop_strings=stop_strings, patience=patience)
    return Resubmission(connection.link, facts, stop_strings=stop_strings)


def _check_stop_strings(facts: Facts, mode: Mode) -> None:
    if mode == "streaming":
        raise CapabilityError("stop_strings=True: vLLM's streaming sessions take none; mode='resubmission' can")
    if not facts.detokenizes:
        raise CapabilityError(
            "stop_strings=True: this vLLM was made with skip_tokenizer_init, so it never sees text and would ignore "
            "them; leave stop_strings off (rows find their stop strings in the ids)"
        )


def _session_link(connection: Connection, facts: Facts) -> LoopLink:
    if not isinstance(connection.link, LoopLink):
        raise CapabilityError(
            "mode='streaming': sessions need an AsyncLLM, or a path for from_pretrained; "
            "an LLM can go by 'resubmission' or 'forced'"
        )
    if facts.speculative:
        raise CapabilityError(
            "mode='streaming': with speculative decoding it is not known which ids a session has kept; "
            "mode='resubmission' can"
        )
    return connection.link


def _check_forced(connection: Connection, facts: Facts) -> None:
    if facts.speculative:
        raise CapabilityError(
            "mode='forced': vLLM takes no custom logits processors with speculative decoding; mode='resubmission' can"
        )
    if not isinstance(connection.link, DirectLink) or not connection.link.in_process:
        raise CapabilityError(
            "mode='forced': the engine's core and its one worker must run in this process: give an LLM made with "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0 on one device, or a path to from_pretrained"
        )
    if not facts.has_processor:
        raise CapabilityError(
            f"mode='forced': midstream's logits processor is not in this LLM; make it with "
            f"logits_processors=[{PROCESSOR_V1!r}]"
        )
    if facts.asynchronous:
        raise CapabilityError(
            "mode='forced': with asynchronous scheduling vLLM samples ahead of what it has told; "
            "make the LLM with async_scheduling=False"
        )
