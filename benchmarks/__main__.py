"""Runs benchmarks, each in a process of its own, and writes their numbers to benchmarks/results.

python -m benchmarks                        # all of them
python -m benchmarks detection scaling      # these
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import benchmarks
from benchmarks.data import REPOSITORY

ELSEWHERE = ("cluster", "scale")
"""Those that need what is not installed here: ``make bench-ray``."""

SUPPORT = ("__main__", "bare", "data", "machine", "page", "peers", "processes", "reaches", "talking")
"""Modules here that measure nothing."""


def main(wanted: list[str]) -> int:
    known = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name not in SUPPORT)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(f"{unknown[0]}: no such benchmark; there are {', '.join(known)}", file=sys.stderr)
        return 2
    names = wanted or [name for name in known if name not in ELSEWHERE]
    failed = []
    for name in names:
        print(f"\n{name}", flush=True)
        result = REPOSITORY / "benchmarks" / "results" / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(result)]
        if subprocess.run(command, cwd=REPOSITORY, check=False).returncode != 0:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
