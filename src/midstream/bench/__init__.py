"""Benchmarks that need nothing but this machine (``midstream bench``): each figure beside something comparable.

Those of the repository's ``benchmarks/`` measure more, against other libraries and with their data.
"""

from midstream.bench.figures import Figure
from midstream.bench.machine import description, load

__all__ = ["Figure", "description", "load"]
