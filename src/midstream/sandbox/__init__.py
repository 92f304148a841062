"""Stateful interpreters for code that nobody has read: one per row, isolated, started in milliseconds.

::

    with SandboxPool() as pool, pool.session() as session:
        session.run("x = 3; y = 4")
        session.run("x + y").text  # '7'
"""

from midstream.sandbox.guardrails import Guardrails
from midstream.sandbox.isolation.report import IsolationReport, Layer
from midstream.sandbox.limits import SandboxLimits
from midstream.sandbox.pool import SandboxPool
from midstream.sandbox.session import Session

__all__ = ["Guardrails", "IsolationReport", "Layer", "SandboxLimits", "SandboxPool", "Session"]
