"""Log records as JSON, one object a line.

midstream logs with the standard library, under the logger ``midstream`` and its children by module. What a record is
about is in its ``extra`` fields too: of a row ``prompt_id`` and ``sample``, of a tool ``tool``.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

_USUAL = {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, the ``extra`` fields,
    and ``exception`` with its traceback where there is one. What JSON cannot hold is its ``repr``."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {name: value for name, value in vars(record).items() if name not in _USUAL and name not in told}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            told["stack"] = record.stack_info
        return json.dumps(told, default=repr)
