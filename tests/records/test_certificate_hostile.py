"""A record from anywhere is refused or checked: nothing in it makes the certificate fail."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midstream.errors import RecordError
from midstream.records import verify
from midstream.records.schema import decode_record
from tests.records.test_certificate_corrupt import sound

_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**63, 2**64, -(2**70), 10**6]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["<code>", "</code>", "generated", "injected", "", "zz", "tell", "paused", "length"]),
    st.just([]),
    st.just({}),
)


def _places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value, containers and leaves."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    return [place for key, item in items for place in ((*path, key), *_places(item, (*path, key)))]


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["answered", "cut", "special", "waiting", "no_room", "call_limit", "fenced"]), st.data())
def test_nothing_in_a_record_makes_the_certificate_fail(name: str, data: st.DataObject) -> None:
    fields = copy.deepcopy(msgspec.json.decode(sound(name).encode()))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(_places(fields)))
        at = fields
        for step in parents:
            at = at[step]
        action = data.draw(st.sampled_from(["replace", "delete", "double"]))
        if action == "replace" or (action == "double" and isinstance(at, dict)):
            at[last] = data.draw(_VALUES)
        elif action == "delete":
            del at[last]
        else:
            at.insert(last, copy.deepcopy(at[last]))
    try:
        record = decode_record(msgspec.json.encode(fields))
    except RecordError:
        return
    for violation in verify(record):
        assert violation.rule
        assert violation.message
