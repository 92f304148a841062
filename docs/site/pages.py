"""Pages as the site wants them."""

from __future__ import annotations

import re
from typing import Any

CODE_OF_A_MODEL = re.compile(r"^```python model$", re.MULTILINE)


def on_page_markdown(markdown: str, **_others: Any) -> str:
    """Called with each page. A fence's second word, which says whose code it is, is for the tests alone."""
    return CODE_OF_A_MODEL.sub("```python", markdown)
