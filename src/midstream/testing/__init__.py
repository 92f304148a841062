"""Checks that one's own parts can be held to."""

from midstream.testing.engine import Steering, check_engine
from midstream.testing.outcomes import CheckFailed, CheckOutcome
from midstream.testing.sandbox import check_sandbox
from midstream.testing.steered_model import write_steered_model

__all__ = ["CheckFailed", "CheckOutcome", "Steering", "check_engine", "check_sandbox", "write_steered_model"]
