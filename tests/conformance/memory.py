"""The names, epochs, ids and tokens of one playing: into its steps, from its messages, and out of its answers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import time
from typing import Any

from tests.conformance.deltas import apply_delta
from tests.conformance.messages import without_bytes

TOKEN_SECRET = "secret-of-thirty-two-bytes-and-more"  # client.token.hmac_secret_key of the profiles
TIME_CLAIMS = ("exp", "nbf", "iat", "expire_at")  # in seconds from now, in the corpus
DIGESTS = {"HS384": hashlib.sha384, "HS512": hashlib.sha512}
LEFT_OUT_OF_PUBLICATIONS = ("epoch", "delta", "version")
NAMED_BY_KEY = ("epoch", "version", "session", "node")

_playings = itertools.count()


def _unique_text() -> str:
    """A text that is new each time. Of small letters, as some of the channels' patterns ask for."""
    number, letters = next(_playings), "q"
    for _ in range(6):
        number, digit = divmod(number, 26)
        letters += chr(ord("a") + digit)
    return letters


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed_token(claims: dict[str, Any], key: str, head: dict[str, Any], cut: int) -> str:
    """A JSON Web Token. cut: how many characters its end lacks."""
    text = _base64(json.dumps(head).encode()) + "." + _base64(json.dumps(claims).encode())
    digest = DIGESTS.get(str(head.get("alg")), hashlib.sha256)
    signature = "" if head.get("alg") == "none" else _base64(hmac.digest(key.encode(), text.encode(), digest))
    token = f"{text}.{signature}"
    return token[: len(token) - cut]


class Memory:
    """`fill` puts values of this playing into a step, `learn` takes them from a message, `normalised` hides them."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()  # set when an event comes to any client
        self.sessions: dict[str, tuple[Any, Any]] = {}  # by client: session and node, for emulation
        self._unique = _unique_text()  # in place of % in names, so that no two playings meet
        self._epochs: dict[Any, str] = {}  # by channel
        self._epoch_names: dict[Any, dict[str, str]] = {}  # by channel and epoch: how answers show it
        self._client_ids: dict[str, str] = {}  # by client
        self._client_names: dict[str, str] = {}  # by id: how answers show it
        self._asked: dict[tuple[str, int], Any] = {}  # by client and id of a command: its channel
        self._delta_bases: dict[tuple[str, Any], bytes] = {}  # by client and channel with deltas: the last text

    # Into steps

    def fill(self, value: Any) -> Any:
        """A value of a step, with the names, tokens, epochs and ids of this playing."""
        if isinstance(value, str):
            return value.replace("%", self._unique)
        if isinstance(value, list):
            return [self.fill(item) for item in value]
        if isinstance(value, dict):
            return self._filled_table(value)
        return value

    def _filled_table(self, table: dict[str, Any]) -> Any:
        match table:
            case {"$token": claims}:
                head = table.get("$head") or {"alg": "HS256", "typ": "JWT"}
                return signed_token(
                    self._filled_claims(claims), table.get("$key", TOKEN_SECRET), head, table.get("$cut", 0)
                )
            case {"$epoch": channel}:
                return self._epochs.get(self.fill(channel), "none")
            case {"$time": seconds}:
                return int(time.time()) + seconds
            case {"$client": client}:
                return self._client_ids.get(client, "?")
            case {"$text": text}:
                return self.fill(text)
            case {"$bytes": digits}:
                return bytes.fromhex(digits)
        return {self.fill(key): self.fill(item) for key, item in table.items()}

    def _filled_claims(self, claims: dict[str, Any]) -> dict[str, Any]:
        filled: dict[str, Any] = self.fill(claims)
        for name in TIME_CLAIMS:
            if type(filled.get(name)) is int and filled[name] != 0:
                filled[name] += int(time.time())
        return filled

    # From messages

    def ask(self, client: str, command: Any) -> None:
        """Keep the channel of a command: its reply does not name it."""
        if isinstance(command, dict) and isinstance(command.get("id"), int):
            for request in command.values():
                if isinstance(request, dict) and isinstance(request.get("channel"), str):
                    self._asked[client, command["id"]] = request["channel"]

    def learn(self, client: str, message: dict[str, Any], unidirectional: bool) -> None:
        """Keep the values of a message that later steps need. In place: epochs get names, deltas are decoded."""
        connected = message.get("connect")
        if isinstance(connected, dict) and connected.get("client"):
            self._learn_client(client, connected)
        if message.get("id"):
            channel = self._asked.get((client, message["id"]))
            self._learn_epoch(channel, message.get("history"))
            self._learn_subscription(client, channel, message.get("subscribe"))
        push = message if unidirectional else message.get("push")
        if isinstance(push, dict):
            self._learn_epoch(push.get("channel"), push.get("subscribe"))
            if isinstance(push.get("pub"), dict):
                self._decode_delta(client, push.get("channel"), push["pub"])

    def _learn_client(self, client: str, connected: dict[str, Any]) -> None:
        identity = self._client_ids[client] = connected["client"]
        if identity not in self._client_names:
            earlier = sum(shown.startswith(f"<client {client}") for shown in self._client_names.values())
            self._client_names[identity] = f"<client {client} {earlier + 1}>" if earlier else f"<client {client}>"
        self.sessions[client] = connected.get("session"), connected.get("node")
        for channel, subscription in (connected.get("subs") or {}).items():
            self._learn_epoch(channel, subscription)

    def _learn_subscription(self, client: str, channel: Any, result: Any) -> None:
        if not isinstance(result, dict):
            return
        self._learn_epoch(channel, result)
        if result.get("delta"):
            self._delta_bases.setdefault((client, channel), b"")
        for publication in result.get("publications") or ():
            self._decode_delta(client, channel, publication)

    def _learn_epoch(self, channel: Any, source: Any) -> None:
        """Keep the epoch in `source`, which is then shown as the first, second … of its channel."""
        if isinstance(source, dict) and source.get("epoch"):
            epoch = self._epochs[channel] = source["epoch"]
            names = self._epoch_names.setdefault(channel, {})
            source["epoch"] = names.setdefault(epoch, f"<epoch {len(names) + 1}>")

    def _decode_delta(self, client: str, channel: Any, publication: dict[str, Any]) -> None:
        """Put the text that a publication stands for in the place of its data, where deltas were agreed on."""
        base = self._delta_bases.get((client, channel))
        if base is None:
            return
        data = publication.get("data")
        try:
            sent = data.encode() if isinstance(data, str) else data or b""
            text = apply_delta(base, sent) if publication.get("delta") else sent
            publication["data"] = {"$decoded": without_bytes(text)}
            self._delta_bases[client, channel] = text
        except (ValueError, TypeError) as error:
            publication["data"] = {"$bad delta": str(error)}

    # In answers

    def normalised(self, value: Any, key: Any = None) -> Any:
        """An answer with names for values that differ from one playing to the next: ids, epochs, versions, times."""
        if isinstance(value, dict):
            left_out = LEFT_OUT_OF_PUBLICATIONS if key in ("pub", "publications") else ()
            return {
                self.normalised(name): self.normalised(item, name)
                for name, item in sorted(value.items(), key=lambda pair: str(pair[0]))
                if name not in left_out
            }
        if isinstance(value, list):
            return [self.normalised(item, key) for item in value]
        if isinstance(value, str):
            if key in NAMED_BY_KEY and value and not value.startswith("<"):
                return f"<{key}>"
            return self._client_names.get(value) or value.replace(self._unique, "%")
        if key == "ttl" and isinstance(value, int) and value:
            return f"<ttl about {round(value / 10) * 10}>" if value > 20 else "<ttl up to 20>"
        if key == "time" and isinstance(value, int) and value > 10**11:
            return "<time>"
        return value
