"""The hosts of sandboxes, as those who use them see them: orders to each, and news for whoever waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from midstream.distributed.actors import Link, RayThread
from midstream.distributed.messages import Asked, Failed, Lost, News, Order

if TYPE_CHECKING:
    from midstream.distributed.pool import RayPool

Post = Callable[[News], None]
HostName = tuple[str, int]
"""A node's id, and the host's number there."""


class Host(Link):
    """An actor with sandboxes of a node, and who waits for news of it. ``cores``: its share of the node's."""

    def __init__(self, thread: RayThread, actor: Any, pool: RayPool, name: HostName, cores: float, level: str) -> None:
        super().__init__(thread, actor)
        self.name = name
        self.node_id = name[0]
        self.cores = cores
        self.level = level
        self.process_id = 0
        self.sessions = 0
        self._pool = pool
        self._waiting: dict[int, Post] = {}

    def order(self, orders: Sequence[Order], post: Post | None) -> None:
        """Send orders; news of those that have a number is given to ``post``, from another thread."""
        self._thread.call(self._take, orders, post)

    def fail_all(self, why: str) -> None:
        """Whoever waits, waits in vain."""
        waiting, self._waiting = self._waiting, {}
        for number, post in waiting.items():
            post(Failed(number, "ProtocolError", why))

    def _take(self, orders: Sequence[Order], post: Post | None) -> None:
        numbers = [order.number for order in orders if hasattr(order, "number")]
        if post is not None:
            for number in numbers:
                if self.lost:
                    post(Lost(number))
                else:
                    self._waiting[number] = post
        self._enqueue(orders)

    def _arrived(self, batch: list[News]) -> None:
        for news in batch:
            asked = isinstance(news, Asked)
            post = self._waiting.get(news.number) if asked else self._waiting.pop(news.number, None)
            if post is not None:
                post(news)

    def _gone(self, error: Exception) -> None:
        self._pool._lost(self, error)
        waiting, self._waiting = self._waiting, {}
        for number, post in waiting.items():
            post(Lost(number))
