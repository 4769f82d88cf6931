"""How the interpreter was built: the same code needs up to a tenth more or less CPU time."""

from __future__ import annotations

import platform
import re
import sys
import sysconfig
from contextlib import suppress


def describe() -> str:
    """Return version, compiler, optimisation and origin of the running interpreter, as one line."""
    settings = sysconfig.get_config_vars()
    configured, flags = str(settings.get("CONFIG_ARGS")), str(settings.get("PY_CFLAGS"))
    level = re.findall(r"-O\w+", flags)
    optimised = [
        level[-1] if level else "no optimisation",
        "PGO" if "--enable-optimizations" in configured else "no PGO",
        "LTO" if re.search(r"--with-lto(?!=no)", configured) else "no LTO",
    ]
    name = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{name}, {platform.python_compiler()}, {' '.join(optimised)}, {_origin()}"


def _origin() -> str:
    if sys.base_prefix == "/usr":
        with suppress(OSError):
            return f"of {platform.freedesktop_os_release()['PRETTY_NAME']}"
    return "not the distribution's"
