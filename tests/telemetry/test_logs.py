"""Log records as JSON."""

from __future__ import annotations

import json
import logging
from datetime import datetime

import pytest

from midstream import SandboxPool
from midstream.telemetry import JsonFormatter
from tests.rollouts import rollouts


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    return logging.getLogger("midstream.somewhere").makeRecord(
        "midstream.somewhere", logging.WARNING, __file__, 1, message, arguments, None, extra=fields
    )


def test_a_record_is_one_object_on_one_line() -> None:
    line = JsonFormatter().format(record("row %s:\nbroken", "p", prompt_id="p", sample=3, odd=object))
    assert "\n" not in line
    told = json.loads(line)
    assert datetime.fromisoformat(told.pop("time")).utcoffset() is not None
    assert told == {
        "level": "warning",
        "logger": "midstream.somewhere",
        "message": "row p:\nbroken",
        "prompt_id": "p",
        "sample": 3,
        "odd": "<class 'object'>",
    }


def test_an_exception_is_told_in_full() -> None:
    told = record("failed", level="mine")
    try:
        raise ValueError("why")
    except ValueError as error:
        told.exc_info = (type(error), error, error.__traceback__)
    found = json.loads(JsonFormatter().format(told))
    assert found["exception"].endswith("ValueError: why")
    assert found["level"] == "warning"  # a field of one's own does not hide it


def test_records_of_rows_and_tools_have_fields(sandboxes: SandboxPool, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ValueError("why")

    with caplog.at_level(logging.DEBUG, "midstream"):
        rollouts({"p": "<code>broken()</code>"}, sandboxes, tools=[broken], reward=lambda t: 1 / 0, n=2)
    told = [json.loads(JsonFormatter().format(one)) for one in caplog.records if one.name.startswith("midstream")]
    assert {one["tool"] for one in told if one["logger"] == "midstream.tools.lanes"} == {"broken"}
    rewards = [one for one in told if one["logger"] == "midstream.delivery"]
    assert sorted((one["prompt_id"], one["sample"]) for one in rewards) == [("p", 0), ("p", 1)]
    assert all(one["exception"].endswith("ZeroDivisionError: division by zero") for one in rewards)
