"""What is random in a session follows from its seed."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder

_NUMPY = "numpy.random"


def seed_everything(seed: int) -> None:
    """Make what is random follow from ``seed``, numpy's numbers too where numpy is imported later.

    Sessions are forked from one process: left alone, all would draw the same numbers.
    """
    stream = random.Random(f"midstream {seed}")  # noqa: S311  # for reproducibility, not secrecy
    random.seed(seed)
    first = stream.getrandbits(32)

    def seed_numpy(numpy_random: types.ModuleType) -> None:
        numpy_random.seed(first)
        # What default_rng() and SeedSequence() draw when they are given no seed.
        numpy_random.bit_generator.randbits = stream.getrandbits

    imported = sys.modules.get(_NUMPY)
    if imported is None:
        sys.meta_path.insert(0, _Seeded(seed_numpy))
    else:
        seed_numpy(imported)


class _Seeded:
    """Finds ``numpy.random`` as Python itself does, and seeds it once it has been imported."""

    def __init__(self, seed: Callable[[types.ModuleType], None]) -> None:
        self._seed = seed

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _NUMPY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_seed(module: types.ModuleType) -> None:
                execute(module)
                self._seed(module)

            spec.loader.exec_module = execute_and_seed  # type: ignore[method-assign]
        return spec
