"""What a tool of an MCP server answered, as a Python value.

Structured content is taken where there is some, else the content blocks: text as ``str``, images and audio as
:class:`~midstream.types.Media`, binary resources as ``bytes``, links as dictionaries. One block is given as itself,
several as a list, none as None.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from midstream.tools.mcp.schema import wrapped_result
from midstream.types import Media


class McpToolError(Exception):
    """A tool of an MCP server said that it failed, in the words of its message."""


def value_of(answer: Any, output_schema: Mapping[str, Any] | None) -> Any:
    """The value in a ``CallToolResult``. Raises McpToolError where the tool reports a failure."""
    blocks = [_block(block) for block in answer.content]
    if answer.is_error:
        words = [block for block in blocks if isinstance(block, str)]
        raise McpToolError("\n".join(words) or "the tool failed without saying why")
    # Text that merely repeats the structured content is its copy for older clients; pictures beside it are not.
    attachments = [block for block in blocks if not isinstance(block, str)]
    if answer.structured_content is None:
        return blocks[0] if len(blocks) == 1 else blocks or None
    structured = _unwrapped(answer.structured_content, output_schema)
    return [structured, *attachments] if attachments else structured


def _unwrapped(structured: Any, output_schema: Mapping[str, Any] | None) -> Any:
    # Structured content must be an object, so servers put any other value under "result" and say so in the schema.
    if isinstance(structured, dict) and set(structured) == {"result"} and wrapped_result(output_schema) is not None:
        return structured["result"]
    return structured


def _block(block: Any) -> Any:
    match block.type:
        case "text":
            return block.text
        case "image" | "audio":
            return Media(block.mime_type, _decoded(block.data, block.type))
        case "resource":
            text = getattr(block.resource, "text", None)
            return text if text is not None else _decoded(block.resource.blob, "resource")
        case _:
            return block.model_dump(mode="json", by_alias=True, exclude_none=True)


def _decoded(data: str, kind: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise McpToolError(f"the tool sent an {kind} that is not base64: {error}") from None
