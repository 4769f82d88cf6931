"""A small application with every annotation that a user would write; mypy checks it in strict mode."""

from __future__ import annotations

from typing import Any, assert_type

from msgspec import Struct

from realtime import (
    App,
    Cache,
    Client,
    ClientError,
    ClientInfo,
    ConnectRequest,
    Cookie,
    Credentials,
    Grant,
    HistoryPage,
    Position,
    Publication,
    Request,
    Response,
)

app = App()


@app.on_connecting
async def authenticate(request: ConnectRequest) -> Credentials:
    return Credentials(user=request.token)


@app.on_disconnected
async def say_goodbye(client: Client) -> None:
    position = await app.publish("news", {"gone": client.user}, tags={"kind": "leave"})
    assert_type(position, Position)


with_reason = App()


@with_reason.on_disconnected
def note_reason(client: Client, code: int, reason: str) -> None:
    assert_type(client.id, str)


@app.on_subscribe("chat:*")
async def may_join(client: Client, channel: str) -> Grant | None:
    members = await app.presence(channel)
    assert_type(members, dict[str, ClientInfo])
    return Grant(info={"admin": True}) if client.user in {member.user for member in members.values()} else None


@app.on_subscribe("news:*", limit=3)
def may_read(client: Client, channel: str, data: dict[str, Any]) -> bool:
    return bool(client.user)


class Order(Struct):
    article: str


@app.rpc("order")
async def take_order(client: Client, data: Order) -> Order:
    assert_type(data.article, str)
    return data


@app.on_publish("chat:*", run="thread")
def moderate(client: Client, channel: str, data: dict[str, Any]) -> dict[str, Any] | None:
    if "text" not in data:
        raise ClientError(400, "no text")
    return {"text": str(data["text"])[:500]}


@app.on_message
async def hear(client: Client, data: Any) -> None:
    client.send(data)


@app.rpc("report", timeout=5, limit=2)
def report(client: Client, data: Any) -> dict[str, int]:
    position = app.result(app.publish("news", data, skip_history=True))
    assert_type(position, Position)
    return {"offset": position.offset}


@app.rpc("render", run="process", cache=Cache(ttl=1, stale=30))
def render(data: Any) -> str:
    return str(data)


@app.http.get("/latest", cache=Cache(ttl=1))
async def latest(request: Request) -> Response:
    page = await app.history("news", limit=int(request.query.get("limit", "10")), reverse=True)
    assert_type(page, HistoryPage)
    assert_type(page.publications, list[Publication])
    outcomes = await app.broadcast(["a", "b"], {"seen": page.position.offset})
    assert_type(outcomes, list[Position | ClientError])
    return Response(body=b"".join(publication.data for publication in page.publications))


@app.http.delete("/rooms/{room}/messages/{number:int}", timeout=3)
async def remove_message(request: Request) -> Response:
    assert_type(request.path_parameters["room"], str | int)
    assert_type(request.cookies, dict[str, str])
    return Response(204, cookies=[Cookie("removed", "yes", same_site="Strict")])


@app.http.post("/orders")
def order_by_post(request: Request) -> Order:
    assert_type(request.json(Order), Order)
    assert_type(request.json(list[Order]), list[Order])
    assert_type(request.form().fields, dict[str, str])
    return request.form(max_fields=5).convert(Order)


@app.http.on_error(KeyError)
def not_found(request: Request, error: KeyError) -> Response:
    return Response(404, body=f"no {error}")


@app.on_start
async def warm_up() -> None:
    assert_type((await app.channels("chat:*"))["chat:1"], int)
    assert_type(await app.presence_stats("chat:1"), tuple[int, int])


def keeps_its_type(client: Client) -> None:
    # A declaration returns the function unchanged, and so does its type.
    assert_type(moderate(client, "chat:1", {}), dict[str, Any] | None)
