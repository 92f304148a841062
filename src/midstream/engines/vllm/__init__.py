"""An engine over vLLM, in three ways; see :class:`VLLMEngine`. Importing it does not import vLLM."""

from midstream.engines.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
