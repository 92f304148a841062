"""What a measurement was made on: as ``midstream bench`` says it."""

from midstream.bench.machine import description, load

__all__ = ["description", "load"]
