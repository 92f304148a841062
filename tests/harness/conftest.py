"""lm_eval is imported here, once, where its own warnings are not errors; it asks no hub for anything."""

import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("lm_eval") is not None:
    home = tempfile.TemporaryDirectory()
    os.environ |= {"HF_HOME": home.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval.models.openai_completions
        import lm_eval.tasks  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:  # lm_eval and datasets leave files to the collector
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
