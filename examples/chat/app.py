"""A chat in rooms. Each room is a channel "room:NAME" with history and presence, set up in realtime.toml.

There are no accounts. A browser tab keeps a random key and shows it when it connects; the user id that others see is
made from it, so a person stays the same over reloads and nobody else can be them.
"""

import hashlib
import os
import re
import time
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from realtime import App, ClientError, Credentials

ROOMS = ("lobby", "kitchen", "garden", "workshop")
ROOM_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")

T = TypeVar("T")


class Hello(Struct):
    """What a tab says when it connects."""

    key: Annotated[str, Meta(min_length=16, max_length=64)]
    nick: Annotated[str, Meta(max_length=24)]


class Message(Struct):
    """What a tab publishes. id: made by the tab, so that a message which it sends twice is shown once."""

    id: Annotated[str, Meta(min_length=1, max_length=64)]
    text: Annotated[str, Meta(max_length=2000)]


app = App()
app.http.static("/", "web")
# The SDK for the page, put here by scripts/run; without it the page takes the same file from a public CDN.
sdk = Path(__file__).parent / "node_modules/centrifuge/dist"
if sdk.is_dir():
    app.http.static("/sdk", sdk)


@app.on_connecting
async def let_in(request):
    hello = understood(request.data, Hello)
    nick = " ".join(hello.nick.split())
    if not nick:
        raise ClientError(400, "a name is needed")
    user = hashlib.blake2b(hello.key.encode(), digest_size=8).hexdigest()
    return Credentials(user=user, info={"nick": nick}, data={"user": user, "nick": nick, "worker": os.getpid()})


@app.on_subscribe("room:*")
async def may_enter(client, channel):
    return ROOM_NAME.fullmatch(channel.removeprefix("room:")) is not None


@app.on_publish("room:*")
async def check(client, channel, data):
    if channel not in client.channels:
        raise ClientError(403, "open the room first")
    message = understood(data, Message)
    text = message.text.strip()
    if not text:
        raise ClientError(400, "there is nothing to say")
    return {"id": message.id, "text": text, "time": int(time.time() * 1000)}


@app.rpc("rooms")
async def rooms(client, data):
    counts = [app.presence_stats(f"room:{name}") for name in ROOMS]
    return [{"name": name, "people": (await count)[1]} for name, count in zip(ROOMS, counts, strict=True)]


def understood(data: object, kind: type[T]) -> T:
    """`data` as a `kind`; for anything else, an error reply that says what is wrong with it."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ClientError(400, str(error)) from None
