"""Inspect is imported here, once, where its own warnings are not errors."""

import warnings
from importlib.util import find_spec

if find_spec("inspect_ai") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import inspect_ai.util  # noqa: F401
