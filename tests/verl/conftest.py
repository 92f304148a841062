"""verl is imported here, once, where its own warnings are not errors."""

import warnings
from importlib.util import find_spec

if find_spec("verl") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import verl.experimental.agent_loop  # noqa: F401
