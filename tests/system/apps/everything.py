"""The application of the system tests: a handler of each kind, small enough to be sure of."""

from __future__ import annotations

import asyncio
import os
import time

from realtime import App, ClientError, Credentials, Response

app = App()


@app.on_connecting
async def let_in(request):
    """A token is left to the server. Without one, the user is what the client says."""
    if request.token:
        return None
    data = request.data or {}
    if data.get("refuse"):
        raise ClientError(*data["refuse"])
    return Credentials(user=data.get("user", "somebody"), info=data.get("info"), data={"pid": os.getpid()})


@app.on_publish("checked:*")
async def check(client, channel, data):
    if data == "forbidden":
        raise ClientError(451, "not that word")
    return {"by": client.user, "said": data}


@app.rpc("echo")
async def echo(client, data):
    return data


@app.rpc("slowly")
async def slowly(client, data):
    await asyncio.sleep(data["seconds"])
    return "done"


@app.rpc("in_thread")
def in_thread(client, data):
    time.sleep(0.01)
    return {"user": client.user, "pid": os.getpid()}


@app.rpc("publish")
def publish(client, data):
    """From a thread: a blocking call."""
    position = app.publish(data["channel"], data["data"])
    return {"offset": position.offset}


@app.rpc("fail")
async def fail(client, data):
    raise RuntimeError("this handler fails on purpose")


@app.rpc("refuse")
async def refuse(client, data):
    raise ClientError(1234, "refused on purpose")


@app.http.get("/pid", pressure="ignore")
async def pid(request):
    return {"pid": os.getpid()}


@app.http.get("/slowly")
async def slowly_over_http(request):
    print("/slowly has begun", flush=True)
    try:
        await asyncio.sleep(float(request.query.get("seconds", 1)))
    finally:
        await asyncio.sleep(0)
        print("/slowly has ended", flush=True)
    return "done"


@app.on_start
async def begin():
    app.options["task"] = asyncio.create_task(periodic())


async def periodic():
    """A task of the application that publishes once more at its end."""
    try:
        while True:
            await asyncio.sleep(3600)
    finally:
        await app.publish("last", "words")
        print("the task has ended", flush=True)


@app.on_stop
async def stopped():
    print("on_stop has run", flush=True)


@app.http.post("/upper")
def upper(request):
    return Response(200, {"content-type": "text/plain; charset=utf-8"}, request.body.decode().upper())
