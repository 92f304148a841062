"""A small MCP server for tests: over standard streams, or with a port over streamable HTTP."""

from __future__ import annotations

import os
import sys
from typing import Literal

import anyio
from mcp.server.mcpserver import Image, MCPServer
from pydantic import BaseModel, Field

server = MCPServer("figures", log_level="ERROR")
PICTURE = b"\x89PNG\r\n\x1a\n picture"


class Place(BaseModel):
    x: int
    y: int = 3


@server.tool()
def add(a: int, b: int = 2, mode: Literal["plain", "loud"] = "plain") -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="list-things")
def list_things(place: Place, label: str | None = Field(None, description="What to call\n them")) -> list[str]:
    """Things at a place."""
    return [f"{label or 'thing'} {place.x}"] * place.y


@server.tool()
def where() -> Place:
    """A place."""
    return Place(x=1)


@server.tool()
def text() -> str:
    """A text."""
    return "grüße\n"


@server.tool(structured_output=False)
def plain_text() -> str:
    """A text without structure."""
    return "plain"


@server.tool()
def picture() -> Image:
    """A picture."""
    return Image(data=PICTURE, format="png")


@server.tool()
def several() -> list[str | Image]:
    """A text and a picture."""
    return ["here", Image(data=PICTURE, format="png")]


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("what the server keeps to itself")


@server.tool()
def pid() -> int:
    """The server's process."""
    return os.getpid()


@server.tool()
def die() -> str:
    """Ends the server."""
    sys.stderr.write("no more\n")
    sys.stderr.flush()
    os._exit(3)


@server.tool()
async def sleep(seconds: float) -> float:
    """Take a while."""
    await anyio.sleep(seconds)
    return seconds


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "refuse":
        sys.exit("this server refuses to start")
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
