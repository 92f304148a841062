"""Functions that a model's code may call. They run outside the sandbox."""

from midstream.tools.host import RowTools, ToolHost
from midstream.tools.interface import ToolContext
from midstream.tools.mcp import McpToolError, McpTools, from_mcp
from midstream.tools.retrieval import DenseRetriever, Documents, Retriever
from midstream.tools.threads import CallThreads, call
from midstream.tools.tool import Tool, ToolSet, ToolSource, tool

__all__ = [
    "CallThreads",
    "DenseRetriever",
    "Documents",
    "McpToolError",
    "McpTools",
    "Retriever",
    "RowTools",
    "Tool",
    "ToolContext",
    "ToolHost",
    "ToolSet",
    "ToolSource",
    "call",
    "from_mcp",
    "tool",
]
