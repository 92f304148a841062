"""Code execution and tools in the middle of an LLM's generation.

::

    import midstream as ms

    engine = ms.HuggingFaceEngine.from_pretrained("path/to/model")
    with ms.Generator(engine, limits=ms.Limits(max_new_tokens=2048)) as generator:
        batch = generator.generate(["What is 48213 * 977?"], n=8)

Importing this loads no torch, transformers, ray, vllm or numpy: what needs them loads them when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from midstream import errors
from midstream.batch import TrajectoryBatch
from midstream.deltas import Delta
from midstream.drop_in import generate_with_code_and_tools
from midstream.engines.base import Capabilities, Engine, RowRequest, Update
from midstream.engines.policy import PolicyEngine
from midstream.engines.scripted import ScriptedEngine
from midstream.families import HERMES_TOOL_CALLS, LLAMA3_TOOL_CALLS, MISTRAL_TOOL_CALLS, QWEN_TOOL_CALLS
from midstream.generation import Generator
from midstream.jobs import KeptSession
from midstream.markup import CODE_TAGS, FENCED_PYTHON, Frame, Markup, Slot, Special, Turn
from midstream.row import Row
from midstream.sandbox import Guardrails, SandboxLimits, SandboxPool, Session
from midstream.tools import Tool, ToolContext, ToolSet, tool
from midstream.types import (
    Call,
    CallRecord,
    ExecutionError,
    ExecutionResult,
    ForkPoint,
    Limits,
    Media,
    Message,
    Prompt,
    Sampling,
    Segment,
    StopKind,
    StopReason,
    ToolCall,
    Trajectory,
    WeightChange,
)
from midstream.vocabulary import TokenizerSource, Vocabulary

if TYPE_CHECKING:
    from midstream.engines.huggingface import HuggingFaceEngine
    from midstream.engines.server import ServerConnection, ServerEngine
    from midstream.engines.vllm import VLLMEngine

__version__ = "0.1.0"

__all__ = [
    "CODE_TAGS",
    "FENCED_PYTHON",
    "HERMES_TOOL_CALLS",
    "LLAMA3_TOOL_CALLS",
    "MISTRAL_TOOL_CALLS",
    "QWEN_TOOL_CALLS",
    "Call",
    "CallRecord",
    "Capabilities",
    "Delta",
    "Engine",
    "ExecutionError",
    "ExecutionResult",
    "ForkPoint",
    "Frame",
    "Generator",
    "Guardrails",
    "HuggingFaceEngine",
    "KeptSession",
    "Limits",
    "Markup",
    "Media",
    "Message",
    "PolicyEngine",
    "Prompt",
    "Row",
    "RowRequest",
    "Sampling",
    "SandboxLimits",
    "SandboxPool",
    "ScriptedEngine",
    "Segment",
    "ServerConnection",
    "ServerEngine",
    "Session",
    "Slot",
    "Special",
    "StopKind",
    "StopReason",
    "TokenizerSource",
    "Tool",
    "ToolCall",
    "ToolContext",
    "ToolSet",
    "Trajectory",
    "TrajectoryBatch",
    "Turn",
    "Update",
    "VLLMEngine",
    "Vocabulary",
    "WeightChange",
    "__version__",
    "errors",
    "generate_with_code_and_tools",
    "tool",
]


_LOADED_WHEN_ASKED_FOR = {
    "HuggingFaceEngine": "midstream.engines.huggingface",
    "ServerConnection": "midstream.engines.server",
    "ServerEngine": "midstream.engines.server",
    "VLLMEngine": "midstream.engines.vllm",
}


def __getattr__(name: str) -> Any:
    if name in _LOADED_WHEN_ASKED_FOR:
        return getattr(import_module(_LOADED_WHEN_ASKED_FOR[name]), name)
    raise AttributeError(f"module 'midstream' has no attribute {name!r}")
