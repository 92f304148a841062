"""verifiers is imported here, once, where its own warnings are not errors, and with a home of its own."""

import os
import tempfile
import warnings
from importlib.util import find_spec

if find_spec("verifiers") is not None:
    home = tempfile.TemporaryDirectory()
    before = os.environ.get("HOME")
    os.environ["HOME"] = home.name  # it keeps folders of rollouts there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import verifiers.v1  # noqa: F401
    if before is not None:
        os.environ["HOME"] = before
