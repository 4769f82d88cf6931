"""An application with a handler that blocks the loop, for tests of what a worker does under pressure."""

from __future__ import annotations

import os
import time

from realtime import App, Cache

app = App()
calls = 0


@app.http.get("/block", pressure="ignore")
async def block(request):
    print("/block has begun", flush=True)
    time.sleep(float(request.query["seconds"]))
    return list(app.pressure)


@app.http.get("/plain")
async def plain(request):
    return "done"


@app.http.get("/kept", cache=Cache(ttl=0.001, stale=600))
async def kept(request):
    global calls
    calls += 1
    return {"call": calls}


@app.http.get("/pid", pressure="ignore")
async def pid(request):
    return os.getpid()
