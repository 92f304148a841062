"""The program of the fork server's process: ``python -P -s bootstrap.py CONTROL HOST``.

``CONTROL`` is the descriptor of the control socket, ``HOST`` a pidfd of the host. The package ``midstream``
is put in place by hand, without running its ``__init__``: the fork server needs a few of its files and
nothing else, and a session must not find the rest in memory.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        name = "<sandbox " + fullname.rpartition(".")[2] + ">"
        return compile(self.get_data(self.path), name, "exec", dont_inherit=True)


class _Finder:
    """Finds the modules of the package below ``root`` and of nothing else."""

    def __init__(self, root: str) -> None:
        self._root = root

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "midstream":
            return None
        file = os.path.join(self._root, *name.split(".")) + ".py"
        if os.path.isfile(file):
            return importlib.machinery.ModuleSpec(name, _Loader(name, file), origin=f"<sandbox {name}>")
        package = importlib.machinery.ModuleSpec(name, None, is_package=True)
        package.submodule_search_locations = []
        return package


def _main() -> None:
    control, host = (int(argument) for argument in sys.argv[1:3])
    root = os.path.abspath(__file__)
    for _ in range(4):
        root = os.path.dirname(root)
    finder = _Finder(root)
    sys.meta_path.insert(0, finder)
    from midstream.sandbox.inside.zygote import serve

    sys.meta_path.remove(finder)
    # The functions live on; the names go, so that a session's own "import midstream" is the real one.
    for name in [name for name in sys.modules if name.partition(".")[0] == "midstream"]:
        del sys.modules[name]
    sys.argv[:] = [""]
    serve(control, host)


_main()
