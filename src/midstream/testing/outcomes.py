"""What a suite of checks found, and how its checks are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """One check: its name, what it found wrong (empty where nothing was)."""

    name: str
    failure: str

    @property
    def passed(self) -> bool:
        return not self.failure


class CheckFailed(AssertionError):
    """A subject that does not do what one must. ``outcomes`` has all checks, those passed too."""

    def __init__(self, outcomes: tuple[CheckOutcome, ...]) -> None:
        self.outcomes = outcomes
        failed = [outcome for outcome in outcomes if not outcome.passed]
        lines = "".join(f"\n- {outcome.name}: {outcome.failure}" for outcome in failed)
        super().__init__(f"{len(failed)} of {len(outcomes)} checks failed:{lines}")


class Wrong(Exception):
    """What a check found."""


def run_checks(checks: Sequence[Callable[[Subject], None]], subject: Subject) -> tuple[CheckOutcome, ...]:
    """Every check on ``subject``, whatever the others found."""
    return tuple(CheckOutcome(name_of(check), _tried(check, subject)) for check in checks)


def name_of(check: Callable[[Subject], None]) -> str:
    """A check's name, as outcomes have it."""
    return check.__name__.replace("_", " ")


def _tried(check: Callable[[Subject], None], subject: Subject) -> str:
    try:
        check(subject)
    except Exception as error:  # noqa: BLE001  # what raises has failed the check
        return str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
    return ""
