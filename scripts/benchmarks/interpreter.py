"""How the interpreter was built: the same code needs up to a tenth more or less CPU time."""

from __future__ import annotations

import platform
import re
import sys
import sysconfig


def describe() -> str:
    """Return version, compiler, optimisation and origin of the running interpreter, as one line."""
    settings = sysconfig.get_config_vars()
    configured, levels = str(settings.get("CONFIG_ARGS")), re.findall(r"-O\w+", str(settings.get("PY_CFLAGS")))
    profiled, linked = "--enable-optimizations" in configured, re.search(r"--with-lto(?!=no)", configured)
    if sys.base_prefix == "/usr":
        # Distributions optimise by their own build rules and leave no trace of that in the settings.
        origin = f"PGO and LTO by the rules of {platform.freedesktop_os_release()['PRETTY_NAME']}"
    else:
        origin = f"{'PGO' if profiled else 'no PGO'}, {'LTO' if linked else 'no LTO'}, not the distribution's"
    name = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{name}, {platform.python_compiler()}, {levels[-1] if levels else 'no optimisation level'}, {origin}"
