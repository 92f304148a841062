"""How many ids a row has, how many it may have, and what room that leaves for a result."""

from __future__ import annotations

from dataclasses import dataclass

from midstream.types import Limits, StopKind, StopReason


@dataclass(slots=True)
class Budget:
    """Counts of ids: the prompt's, ``generated`` and ``injected`` ones. ``max_total``: None for no bound."""

    prompt: int
    max_total: int | None
    generated: int = 0
    injected: int = 0

    @classmethod
    def of(cls, prompt: int, limits: Limits, context_length: int | None) -> Budget:
        bounds = [n for n in (context_length, limits.max_total_tokens) if n is not None]
        return cls(prompt, min(bounds, default=None))

    @property
    def total(self) -> int:
        return self.prompt + self.generated + self.injected

    def longest(self, limits: Limits) -> int | None:
        """The row never holds more ids than this; None where nothing bounds it."""
        bounds = [] if self.max_total is None else [self.max_total]
        if limits.max_new_tokens is not None and limits.count_injected:
            bounds.append(self.prompt + limits.max_new_tokens)
        return min(bounds, default=None)

    def room(self, limits: Limits) -> int | None:
        """How many ids a result may take, its own budget aside."""
        longest = self.longest(limits)
        return None if longest is None else longest - self.total - limits.reserve_tokens

    def reached(self, limits: Limits) -> StopReason | None:
        """Why the row must stop here, if a bound is reached."""
        new = self.generated + (self.injected if limits.count_injected else 0)
        if limits.max_new_tokens is not None and new >= limits.max_new_tokens:
            return StopReason(StopKind.LENGTH, "new_tokens")
        if self.max_total is not None and self.total >= self.max_total:
            return StopReason(StopKind.LENGTH, "total_tokens")
        return None
