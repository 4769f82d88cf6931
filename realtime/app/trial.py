"""Read a configuration and import its application in a process of its own, and report what a server would find.

    python -P -m realtime.app.trial < sources

`realtime.supervisor.trial` starts it before a reload. The sources come as MessagePack of
`realtime.config.sources.Sources`. Descriptor 3 gets MessagePack of `realtime.supervisor.trial.TrialResult`. What the
application prints goes where the workers' output goes.
"""

from __future__ import annotations

import os
import sys

import msgspec

from realtime._version import __version__
from realtime.app.loader import load
from realtime.config import warnings
from realtime.config.sources import Sources
from realtime.errors import ApplicationFailed, SettingsError

_RESULT = 3


def main() -> int:
    """Try it out, and return the exit status."""
    os.set_inheritable(_RESULT, False)
    sources = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Sources)
    result: dict[str, object]
    try:
        settings = sources.read()
        load(settings.app)
    except SettingsError as error:
        result = {"problems": error.problems}
    except ApplicationFailed as error:
        result = {"problems": [str(error)]}
    else:
        result = {"settings": settings, "warnings": warnings.find_warnings(settings, {})}
    with open(_RESULT, "wb") as pipe:
        pipe.write(msgspec.msgpack.encode({**result, "version": __version__}))
    # Threads and exit functions of the application must not keep this process.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
