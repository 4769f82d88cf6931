"""Runs the benchmark that is named: a module beside this one, whose `main` takes the arguments."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = ("blocked", "thrash", "vitals")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in BENCHMARKS:
        for name in BENCHMARKS:
            summary = (importlib.import_module(name).__doc__ or "").partition("\n")[0]
            print(f"scripts/bench {name:10}  {summary}")
        return 0 if not arguments else 64
    result: int = importlib.import_module(arguments[0]).main(arguments[1:])
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
