"""From what the caller has (a vLLM object, a path) to a link to vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from midstream.engines.vllm.direct import DirectLink
from midstream.engines.vllm.facts import add_processor
from midstream.engines.vllm.guarding import Guard
from midstream.engines.vllm.looped import LoopLink
from midstream.engines.vllm.resubmission import Link
from midstream.engines.vllm.ways import Mode
from midstream.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Connection:
    """vLLM's object, its configuration, the tokenizer, the link to it, and the guard of what was started for it."""

    llm: Any
    config: Any
    tokenizer: Any
    link: Link
    guard: Guard = field(default_factory=Guard)

    def shutdown(self) -> None:
        """End the requests made through it, and vLLM itself if it was started here. May be called twice."""
        try:
            self.link.shutdown()
        finally:
            self.guard.close()


def connect(llm: Any, tokenizer: Any) -> Connection:
    """A link to what the caller made and keeps."""
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    if isinstance(llm, AsyncLLM):
        serving = llm.output_handler
        if serving is not None and serving.done():
            raise ConfigurationError(
                "llm: the event loop that this AsyncLLM served in has ended, and it serves in no other; make a new one"
            )
        tokenizer = _tokenizer(llm.vllm_config, tokenizer)
        loop = None if serving is None else serving.get_loop()
        looped = LoopLink(lambda: llm, owned=False, loop=loop)
        return Connection(llm, llm.vllm_config, tokenizer, looped)
    if isinstance(llm, LLM | LLMEngine):
        engine = llm.llm_engine if isinstance(llm, LLM) else llm
        link: Link = DirectLink(engine, owned=False)
        return Connection(llm, engine.vllm_config, _tokenizer(engine.vllm_config, tokenizer), link)
    raise ConfigurationError(
        f"llm={type(llm).__name__}: must be a vllm.LLM, LLMEngine or AsyncLLM; a path is for from_pretrained"
    )


def make(path: str, mode: Mode, options: Mapping[str, Any]) -> Connection:
    """vLLM started on ``path`` as ``mode`` needs it, with midstream's logits processor where there may be one."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    settings: dict[str, Any] = {"enable_prefix_caching": True, "disable_log_stats": True}
    if mode == "forced":
        settings["async_scheduling"] = False
    try:
        config = EngineArgs(model=path, **{**settings, **options}).create_engine_config()
    except (TypeError, ValueError, OSError) as error:
        raise ConfigurationError(f"path={path!r}: vLLM cannot be started on it: {error}") from error
    add_processor(config)
    tokenizer = _tokenizer(config, None)
    guard = Guard()
    with guard.over_new_children():
        if mode == "streaming":
            looped = LoopLink(lambda: AsyncLLM.from_vllm_config(config, disable_log_stats=True), owned=True)
            return Connection(looped.llm, config, tokenizer, looped, guard)
        if mode == "forced":
            engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
        else:
            engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        return Connection(engine, config, tokenizer, DirectLink(engine, owned=True), guard)


def _tokenizer(config: Any, given: Any) -> Any:
    """The tokenizer as transformers loads it: vLLM's own may be wrapped in ways that hide what it is."""
    if given is not None:
        return given
    model = config.model_config
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"tokenizer: none can be loaded from {model.tokenizer!r}; give one: {error}"
        ) from error
