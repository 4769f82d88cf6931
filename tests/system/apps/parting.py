"""An application that writes each end of a connection to a file, with a code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from realtime import App, Credentials

app = App()


@app.on_connecting
async def let_in(request: Any) -> Any:
    return Credentials(user=request.data["user"], data={"pid": os.getpid()})


@app.on_disconnected
async def note(client: Any, code: int, reason: str) -> None:
    with Path(app.options["file"]).open("a") as file:
        file.write(f"{client.id} {client.user} {code} {reason}\n")
