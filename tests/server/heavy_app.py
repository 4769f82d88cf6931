"""An application whose handlers run in processes, and do there what handlers should not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from realtime.app import App, Request, Response
from realtime.errors import ClientError, Disconnect

app = App()


def declare(name: str, timeout: float = 20, limit: int | None = None) -> Any:
    return app.rpc(name, run="process", timeout=timeout, limit=limit)


@declare("echo")
def echo(data: Any) -> Any:
    return {"data": data, "pid": os.getpid(), "options": app.options, "twisted": "twisted" in sys.modules}


@declare("limited", limit=1)
def limited(data: Any) -> Any:
    return data


@declare("refuse")
def refuse(data: Any) -> None:
    raise ClientError(444, "no such report", temporary=True)


@declare("close")
def close(data: Any) -> None:
    raise Disconnect(4500, "go away")


@declare("fail")
def fail(data: Any) -> None:
    raise SystemExit("the handler's own mistake")


@declare("unencodable")
def unencodable(data: Any) -> Any:
    return object()


@declare("publish")
def publish(data: Any) -> Any:
    return app.publish("news", data)


@declare("quit")
def quit_with(data: int) -> None:
    os._exit(data)


@declare("huge")
def huge(data: int) -> str:
    return "x" * data


@declare("junk")
def junk(data: str) -> None:
    """Write to every socket that there is: one of them is the worker's."""
    for fd in range(3, 32):
        try:
            os.write(fd, data.encode("latin-1"))
        except OSError:
            continue
    time.sleep(60)


@declare("sleep")
def sleep(data: list[Any]) -> str:
    """Tell the pid by way of a file, then sleep."""
    path, seconds = data
    with open(f"{path}.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{path}.part", path)
    time.sleep(seconds)
    return "slept"


@declare("deaf")
def deaf(data: str) -> None:
    """Ignore all that can be ignored, have a process of its own, and keep the core and the GIL busy."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    other = subprocess.Popen(["sleep", "600"])
    with open(f"{data}.part", "w") as file:
        file.write(f"{os.getpid()} {other.pid}")
    os.rename(f"{data}.part", data)
    sum(range(10**12))


@app.http.post("/render", run="process")
def render(request: Request) -> Response:
    return Response(201, {"X-Length": str(len(request.body))}, request.body.upper())
