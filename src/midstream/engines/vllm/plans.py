"""What the logits processor is to force, by request: the engine and the processor share it in one process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Plan:
    """From position ``start`` of the row on, ``ids`` are forced; while they are not known, ``stop_id`` is.

    ``until``: the ``time.monotonic()`` up to which the engine's next step may be put off for ``ids``.
    """

    start: int
    stop_id: int
    until: float
    ids: tuple[int, ...] | None = None

    def forced(self, position: int) -> int | None:
        """The id to force at ``position``, or None.

        It depends on the position alone: vLLM may ask twice for one id, where it computes a row anew.
        """
        if self.ids is None:
            return self.stop_id
        place = position - self.start
        return self.ids[place] if 0 <= place < len(self.ids) else None


plans: dict[str, Plan] = {}
