"""Mistakes in an application that mypy must find: the comment of a line is the code of the error expected there."""

from __future__ import annotations

from typing import Any

from realtime import App, Client, ConnectRequest, Position, Request

app = App()


@app.on_connecting  # type-var
async def gives_a_name(request: ConnectRequest) -> str:
    return request.token


@app.on_subscribe("a")  # type-var
async def takes_no_channel(client: Client) -> bool:
    return True


@app.on_publish("a")  # type-var
async def takes_no_data(client: Client, channel: str) -> None: ...


@app.rpc("a", run="fork")  # arg-type
def runs_elsewhere(client: Client, data: Any) -> None: ...


@app.http.get("/")  # type-var
async def takes_a_client(request: Client) -> None: ...


async def calls(request: Request) -> None:
    await app.publish("news", 1, skip_histroy=True)  # call-arg
    await app.publish("news", 1, tags={"n": 1})  # dict-item
    position: Position = app.publish("news", 1)  # assignment
    print(position, (await app.presence("news"))["id"].name)  # attr-defined
