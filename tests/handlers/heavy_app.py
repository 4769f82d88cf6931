"""An application whose handlers run in processes; many of them misbehave there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from msgspec import Struct

from realtime.app import App, Request, Response
from realtime.errors import ClientError, Disconnect

app = App()


def declare(name: str, timeout: float = 20, limit: int | None = None) -> Any:
    return app.rpc(name, run="process", timeout=timeout, limit=limit)


@declare("echo")
def echo(data: Any) -> Any:
    return {"data": data, "pid": os.getpid(), "options": app.options, "twisted": "twisted" in sys.modules}


class Order(Struct):
    article: str


@declare("order")
def order(data: Order) -> str:
    return data.article


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


@declare("voice")
def voice(data: list[Any]) -> Any:
    """Call a method of the App, and return the `repr` of its result or exception."""
    method, args = data
    try:
        return repr(getattr(app, method)(*args))
    except Exception as error:
        return repr(error)


@declare("length of history")
def length_of_history(data: Any) -> int:
    return len(app.history("news").publications[0].data)


@declare("publish twice", timeout=10)
def publish_twice(data: str) -> Any:
    """Publish from the handler and from a thread that outlives it; the thread writes its error to the file `data`."""
    offsets: list[Any] = []

    def publish_from_thread() -> None:
        offsets.append(app.publish("news", "from a thread").offset)
        time.sleep(0.2)
        try:
            app.publish("news", "too late")
        except RuntimeError as error:
            with open(f"{data}.part", "w") as file:
                file.write(str(error))
            os.rename(f"{data}.part", data)

    thread = threading.Thread(target=publish_from_thread)
    thread.start()
    offsets.append(app.publish("news", "from the handler").offset)
    while len(offsets) < 2:
        time.sleep(0.005)
    return sorted(offsets)


@declare("never answered")
def never_answered(data: str) -> Any:
    return app.publish("never", data)


@declare("unsendable")
def unsendable(data: Any) -> Any:
    return app.publish("news", 1, tags=lambda: None)  # type: ignore[arg-type]


IMPORT_ERROR = ""
try:
    app.publish("news", 1)
except RuntimeError as problem:
    IMPORT_ERROR = str(problem)


@declare("imported")
def imported(data: Any) -> str:
    """Return the error of an attempt to publish during the import of this module."""
    return IMPORT_ERROR


@declare("quit")
def quit_with(data: int) -> None:
    os._exit(data)


@declare("huge")
def huge(data: int) -> str:
    return "x" * data


@declare("junk")
def junk(data: str) -> None:
    """Write to every open descriptor: one of them is the stream to the worker."""
    for fd in range(3, 32):
        try:
            os.write(fd, data.encode("latin-1"))
        except OSError:
            continue
    time.sleep(60)


@declare("sleep")
def sleep(data: list[Any]) -> str:
    """Write the pid to a file, then sleep."""
    path, seconds = data
    with open(f"{path}.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{path}.part", path)
    time.sleep(seconds)
    return "slept"


@declare("deaf")
def deaf(data: str) -> None:
    """Ignore signals, start a process, write both pids to a file, and keep the core and the GIL busy."""
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


@app.http.post("/fail", run="process")
def fail_route(request: Request) -> None:
    raise KeyError(request.body.decode())


@app.http.on_error(LookupError)
def answer_error(request: Request, error: LookupError) -> Response:
    return Response(404, {"X-Pid": str(os.getpid())}, f"{request.path}: {error}")
