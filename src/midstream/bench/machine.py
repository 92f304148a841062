"""What a measurement was made on, without anything that names the machine."""

from __future__ import annotations

import os
import platform
from typing import Any


def description() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:2]),
        "python": platform.python_version(),
    }


def load() -> float:
    """How many threads wanted to run in the last minute, this measurement's included."""
    return round(os.getloadavg()[0], 1)
