"""What isolation holds on this machine, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["full", "container", "weak"]

LAYERS = ("filesystem", "network", "processes", "signals")
"""The layers without which sessions are not isolated at all."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: whether it holds, what was tried and what came of it, and what it is made of."""

    name: str
    holds: bool
    tried: str
    made_of: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """All layers, and the level that they come to: ``full``, ``container``, or ``weak`` below that."""

    level: Level
    layers: tuple[Layer, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """The required layers that do not hold."""
        return tuple(layer.name for layer in self.layers if layer.required and not layer.holds)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "level": self.level,
            "layers": [
                {
                    "name": layer.name,
                    "holds": layer.holds,
                    "required": layer.required,
                    "tried": layer.tried,
                    "made_of": layer.made_of,
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        lines = [f"isolation: {self.level}"]
        for layer in self.layers:
            state = "holds" if layer.holds else "MISSING" if layer.required else "not here"
            lines.append(f"  {layer.name:<12} {state:<9} {layer.tried} ({layer.made_of})")
        return "\n".join(lines)
