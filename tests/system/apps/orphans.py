"""A handler that leaves a program behind."""

from __future__ import annotations

import subprocess
from typing import Any

from realtime import App

app = App()
programs: list[subprocess.Popen[bytes]] = []


@app.http.get("/orphan")
async def leave_one(request: Any) -> None:
    programs.append(subprocess.Popen(["sleep", "600"], start_new_session=True))  # else it ends with the worker
