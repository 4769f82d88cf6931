"""An application that writes to its log and to standard output."""

from __future__ import annotations

import os

from twisted.logger import Logger

from realtime import App

app = App()
log = Logger()


@app.http.get("/talk", pressure="ignore")
async def talk(request):
    for _ in range(int(request.query["bytes"]) // 100):
        log.info("{text}", text="x" * 100)
        print("y" * 100, flush=True)
    return "done"


@app.http.get("/pid")
async def pid(request):
    return os.getpid()
