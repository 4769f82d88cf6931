"""The Protobuf messages of the client protocol as dictionaries, read and written by a table of their fields.

The table is independent of the server's: a mistake in one of them shows as a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

# By message: its fields as name:number:type. A type is one of Protobuf, a message, or map= or list= of a type.
FIELDS = {
    "EmulationRequest": "node:1:string session:2:string data:3:bytes",
    "Command": """
        id:1:uint connect:4:ConnectRequest subscribe:5:SubscribeRequest unsubscribe:6:Channel publish:7:PublishRequest
        presence:8:Channel presence_stats:9:Channel history:10:HistoryRequest ping:11:Nothing send:12:Data
        rpc:13:RPCRequest refresh:14:RefreshRequest sub_refresh:15:SubRefreshRequest""",
    "Reply": """
        id:1:uint error:2:Error push:4:Push connect:5:ConnectResult subscribe:6:SubscribeResult unsubscribe:7:Nothing
        publish:8:Nothing presence:9:PresenceResult presence_stats:10:PresenceStatsResult history:11:HistoryResult
        ping:12:Nothing rpc:13:Data refresh:14:RefreshResult sub_refresh:15:Refresh""",
    "Push": """
        id:1:int channel:2:string pub:4:Publication join:5:Info leave:6:Info unsubscribe:7:Unsubscribe message:8:Data
        subscribe:9:Subscribe connect:10:Connect disconnect:11:Disconnect refresh:12:Refresh""",
    "Nothing": "",
    "Channel": "channel:1:string",
    "Data": "data:1:bytes",
    "Info": "info:1:ClientInfo",
    "Error": "code:1:uint message:2:string temporary:3:bool",
    "ClientInfo": "user:1:string client:2:string conn_info:3:bytes chan_info:4:bytes",
    "Publication": """
        data:4:bytes info:5:ClientInfo offset:6:uint tags:7:map=string delta:8:bool time:9:int channel:10:string
        key:11:string removed:12:bool score:13:zigzag epoch:14:string prev_data:15:bytes version:16:uint""",
    "Unsubscribe": "code:2:uint reason:3:string",
    "Disconnect": "code:1:uint reason:2:string reconnect:3:bool",
    "Subscribe": "recoverable:1:bool epoch:4:string offset:5:uint positioned:6:bool data:7:bytes",
    "Refresh": "expires:1:bool ttl:2:uint",
    "RefreshResult": "client:1:string version:2:string expires:3:bool ttl:4:uint",
    "Connect": """
        client:1:string version:2:string data:3:bytes subs:4:map=SubscribeResult expires:5:bool ttl:6:uint ping:7:uint
        pong:8:bool session:9:string node:10:string time:11:int""",
    "ConnectResult": """
        client:1:string version:2:string expires:3:bool ttl:4:uint data:5:bytes subs:6:map=SubscribeResult ping:7:uint
        pong:8:bool session:9:string node:10:string time:11:int""",
    "ConnectRequest": """
        token:1:string data:2:bytes subs:3:map=SubscribeRequest name:4:string version:5:string headers:6:map=string
        flag:7:int""",
    "SubscribeRequest": """
        channel:1:string token:2:string recover:3:bool epoch:6:string offset:7:uint data:8:bytes positioned:9:bool
        recoverable:10:bool join_leave:11:bool delta:12:string tf:13:Filter flag:14:int type:15:int phase:16:int
        cursor:17:string limit:18:int asc:19:bool""",
    "SubscribeResult": """
        expires:1:bool ttl:2:uint recoverable:3:bool epoch:6:string publications:7:list=Publication recovered:8:bool
        offset:9:uint positioned:10:bool data:11:bytes was_recovering:12:bool delta:13:bool id:14:int type:15:int
        phase:16:int cursor:17:string state:18:list=Publication publish_debounce:19:uint""",
    "Filter": "op:1:string key:2:string cmp:3:string val:4:string vals:5:list=string nodes:6:list=Filter",
    "PublishRequest": "channel:1:string data:2:bytes type:3:int key:4:string removed:5:bool",
    "PresenceResult": "presence:1:map=ClientInfo",
    "PresenceStatsResult": "num_clients:1:uint num_users:2:uint",
    "HistoryRequest": "channel:1:string limit:7:int since:8:Position reverse:9:bool",
    "Position": "offset:1:uint epoch:2:string",
    "HistoryResult": "publications:1:list=Publication epoch:2:string offset:3:uint",
    "RPCRequest": "data:1:bytes method:2:string",
    "RefreshRequest": "token:1:string",
    "SubRefreshRequest": "channel:1:string token:2:string type:3:int",
}


def _table(fields: str) -> dict[str, tuple[int, str]]:
    parts = (field.split(":") for field in fields.split())
    return {name: (int(number), type_) for name, number, type_ in parts}


SCHEMA = {message: _table(fields) for message, fields in FIELDS.items()}


def write_varint(number: int) -> bytes:
    """The bytes of an integer. One below 0 is written as 64 bits."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer that begins at `at`, and where the next field begins. IndexError: the data ends before it does."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def sized(data: bytes) -> bytes:
    """The data behind its length."""
    return write_varint(len(data)) + data


def _write_field(number: int, type_: str, value: Any) -> bytes:
    if type_ in ("uint", "int", "bool"):
        return write_varint(number << 3) + write_varint(int(value))
    if type_ == "zigzag":
        return write_varint(number << 3) + write_varint(value << 1 ^ value >> 63)
    if type_ == "string":
        data = str(value).encode("utf-8", "surrogatepass")
    elif type_ == "bytes":
        data = value if isinstance(value, bytes) else json_bytes(value)
    else:
        data = write_message(type_, value)
    return write_varint(number << 3 | 2) + sized(data)


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def write_message(message: str, values: dict[str, Any]) -> bytes:
    """The bytes of a dictionary. Names that the message does not have are left out, and so is None."""
    out = b""
    for name, value in values.items():
        if name not in SCHEMA[message] or value is None:
            continue
        number, type_ = SCHEMA[message][name]
        if type_.startswith("map="):
            for key, item in value.items():
                entry = _write_field(1, "string", key) + _write_field(2, type_.removeprefix("map="), item)
                out += write_varint(number << 3 | 2) + sized(entry)
        elif type_.startswith("list="):
            out += b"".join(_write_field(number, type_.removeprefix("list="), item) for item in value)
        else:
            out += _write_field(number, type_, value)
    return out


def _read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The number and the value of each field; the value is an integer or bytes."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = read_varint(data, at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(tag & 7) or read_varint(data, at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def read_message(message: str, data: bytes) -> dict[str, Any]:
    """The dictionary that the bytes stand for. IndexError, ValueError or AttributeError: they are damaged."""
    names = {number: (name, type_) for name, (number, type_) in SCHEMA[message].items()}
    out: dict[str, Any] = {}
    for number, value in _read_fields(data):
        name, type_ = names.get(number, (f"$field {number}", "unknown"))
        if type_.startswith("map="):
            entry = dict(_read_fields(value))
            key = entry.get(1, b"").decode()
            out.setdefault(name, {})[key] = _read_value(type_.removeprefix("map="), entry.get(2, b""))
        elif type_.startswith("list="):
            out.setdefault(name, []).append(_read_value(type_.removeprefix("list="), value))
        else:
            out[name] = _read_value(type_, value)
    return out


def _read_value(type_: str, value: Any) -> Any:
    match type_:
        case "uint" | "bytes":
            return value
        case "bool":
            return bool(value)
        case "int":
            return value - (1 << 64) if value >= 1 << 63 else value
        case "zigzag":
            return value >> 1 ^ -(value & 1)
        case "string":
            return value.decode("utf-8", "replace")
        case "unknown":
            return value.hex() if isinstance(value, bytes) else value
        case _:
            return read_message(type_, value)


def without_bytes(value: Any) -> Any:
    """A message with its byte fields as the JSON values that they hold."""
    if isinstance(value, dict):
        return {key: without_bytes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_bytes(item) for item in value]
    if isinstance(value, bytes):
        try:
            return json.loads(value)
        except ValueError:
            return {"$bytes": value.hex()}
    return value
