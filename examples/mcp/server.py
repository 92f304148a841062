"""An MCP server with three small tools about a shop, as anyone would write it."""

from __future__ import annotations

from mcp.server.mcpserver import MCPServer

server = MCPServer("shop", log_level="ERROR")

PRICES = {"apple": 0.4, "bread": 2.5, "cheese": 7.25, "date": 0.15}
STOCK = {"apple": 120, "bread": 8, "cheese": 0, "date": 900}


@server.tool()
def products() -> list[str]:
    """All products that the shop has."""
    return sorted(PRICES)


@server.tool()
def price(product: str, pieces: int = 1) -> float:
    """What so many pieces of a product cost."""
    return round(PRICES[product] * pieces, 2)


@server.tool()
def in_stock(product: str) -> int:
    """How many pieces of a product there are."""
    return STOCK[product]


if __name__ == "__main__":
    server.run()
