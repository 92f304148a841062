"""An engine over servers that speak token ids; see :class:`ServerEngine`."""

from midstream.engines.server.connection import ServerConnection
from midstream.engines.server.engine import ServerEngine

__all__ = ["ServerConnection", "ServerEngine"]
