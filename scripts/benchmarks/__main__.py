"""Run one benchmark by its name: a function of `costs`, or `main` of another module in this folder."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import costs
import interpreter

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1]))  # `reload` has the clients of tests/soak

# Modules by their name on the command line.
SCENES = {
    "http": "http_requests",
    "attack": "attack",
    "blocked": "blocked",
    "reload": "reload",
    "redis": "redis_engine",
    "thrash": "thrash",
    "vitals": "vitals",
    "all": "everything",
    "page": "page",
}


def main(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in costs.COSTS or name in SCENES:
        print(interpreter.describe())
    if name in costs.COSTS:
        return costs.main(name, rest)
    if name in SCENES:
        result: int = importlib.import_module(SCENES[name]).main(rest)
        return result
    abouts = {one: function.__doc__ for one, function in costs.COSTS.items()}
    abouts |= {one: ast.get_docstring(ast.parse((HERE / f"{module}.py").read_text())) for one, module in SCENES.items()}
    for one, about in abouts.items():
        print(f"scripts/bench {one:8}  {(about or '').partition(chr(10))[0]}")
    return 64 if name else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
