"""Properties that hold for any text, any cut into tokens and any limits, checked with random ones.

The examples are the same in every run, so that a run says something of a change and not of luck. With
``MIDSTREAM_EXAMPLES=2000`` each property gets that many examples, new ones each time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_EXAMPLES = os.environ.get("MIDSTREAM_EXAMPLES")


def examples(count: int) -> settings:
    """Settings for about ``count`` examples."""
    return settings(
        max_examples=int(_EXAMPLES) if _EXAMPLES else count,
        derandomize=not _EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
