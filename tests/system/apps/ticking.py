"""An application that writes each run of its periodic functions to a file."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from realtime import App

INTERVAL = 0.2

app = App()


def note(line: str) -> None:
    with Path(app.options["file"]).open("a") as file:
        file.write(f"{line}\n")


@app.every(INTERVAL)
async def once(term: int) -> None:
    note(f"once {os.getpid()} {term} {math.floor(time.time() / INTERVAL + 0.01)}")


@app.every(INTERVAL, where="each", immediately=True)
def each() -> None:
    note(f"each {os.getpid()} {app.worker.slot} {app.worker.count}")
