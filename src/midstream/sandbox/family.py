"""The host's hold on a session and its clones, which one warden watches over."""

from __future__ import annotations

import json
import socket

MOST_CLONES = 32
"""How many clones a warden makes at one request."""


class Family:
    """A warden's socket. Closed with the last session that holds it: then the warden ends."""

    def __init__(self, descriptor: int) -> None:
        self._warden = socket.socket(fileno=descriptor)

    def request_clones(self, parent: int, channels: list[socket.socket]) -> None:
        """Ask for a clone of process ``parent`` at the end of each channel.

        To be called before the parent is told to fork: by the time that it asks for leave, the warden must know.
        """
        self._ask({"fork": parent}, channels)

    def request_checkpoint(self, parent: int, channel: socket.socket) -> None:
        """Ask for an exact clone of process ``parent``, which then stands still. To be called before, as above."""
        self._ask({"checkpoint": parent}, [channel])

    def roll_back(self, parent: int) -> None:
        """Ask that the clone of the last checkpoint be killed, if it lives, and that ``parent`` go on."""
        self._ask({"rollback": parent}, [])

    def _ask(self, request: dict[str, int], channels: list[socket.socket]) -> None:
        socket.send_fds(self._warden, [json.dumps(request).encode()], [channel.fileno() for channel in channels])

    def __del__(self) -> None:
        self._warden.close()
