"""Whatever a row does, its record passes: the certificate's reading and the row's agree on random texts."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from midstream.records import verify
from tests.records.trajectories import Scenario, drive, scenarios


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios())
def test_every_trajectory_of_a_row_passes(scenario: Scenario) -> None:
    record = drive(scenario)
    assert [str(violation) for violation in verify(record)] == []
