"""A chat in rooms. Each room is a channel "room:NAME" with history and presence, set up in realtime.toml.

There are no accounts. Each browser tab keeps a random key and sends it when it connects. The server derives the public
user id from this key, so a person keeps their id over reloads, and other people can't use it.
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
    """The data of a tab's connect command."""

    key: Annotated[str, Meta(min_length=16, max_length=64)]
    nick: Annotated[str, Meta(max_length=24)]


class Message(Struct):
    """The data of a tab's publication. id: chosen by the tab, so that readers see a repeated message only once."""

    id: Annotated[str, Meta(min_length=1, max_length=64)]
    text: Annotated[str, Meta(max_length=2000)]


app = App()
app.http.static("/", "web")
# scripts/run installs the SDK for the page here; otherwise the page loads the same file from a public CDN.
sdk = Path(__file__).parent / "node_modules/centrifuge/dist"
if sdk.is_dir():
    app.http.static("/sdk", sdk)


@app.on_connecting
async def authenticate(request):
    hello = convert(request.data, Hello)
    nick = " ".join(hello.nick.split())
    if not nick:
        raise ClientError(400, "a name is required")
    user = hashlib.blake2b(hello.key.encode(), digest_size=8).hexdigest()
    return Credentials(user=user, info={"nick": nick}, data={"user": user, "nick": nick, "worker": os.getpid()})


@app.on_subscribe("room:*")
async def may_join(client, channel):
    return ROOM_NAME.fullmatch(channel.removeprefix("room:")) is not None


@app.on_publish("room:*")
async def check(client, channel, data):
    if channel not in client.channels:
        raise ClientError(403, "open the room first")
    message = convert(data, Message)
    text = message.text.strip()
    if not text:
        raise ClientError(400, "the message is empty")
    return {"id": message.id, "text": text, "time": int(time.time() * 1000)}


@app.rpc("rooms")
async def rooms(client, data):
    counts = [app.presence_stats(f"room:{name}") for name in ROOMS]
    return [{"name": name, "people": (await count)[1]} for name, count in zip(ROOMS, counts, strict=True)]


def convert(data: object, kind: type[T]) -> T:
    """Return `data` as a `kind`. Raises ClientError with the reason if that is impossible."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ClientError(400, str(error)) from None
