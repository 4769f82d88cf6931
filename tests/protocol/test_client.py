"""The client as handlers see it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from realtime.protocol.client import ConnectedClient, encode_content, release, subscribe_options
from realtime.types import ClientInfo, Grant, Position, SubscribeOptions


class RecordedSession:
    """Records the calls to it."""

    def __init__(self) -> None:
        self.info = ClientInfo("ann", "c1", b'{"name":"Ann"}')
        self.calls: list[Any] = []

    def send(self, data: Any) -> None:
        self.calls.append(("send", data))

    def disconnect(self, code: int, reason: str) -> None:
        self.calls.append(("disconnect", code, reason))

    def subscribe(self, channel: str, options: SubscribeOptions, since: Position | None) -> None:
        self.calls.append(("subscribe", channel, options, since))

    def unsubscribe(self, channel: str, code: int, reason: str) -> None:
        self.calls.append(("unsubscribe", channel, code, reason))

    def refresh(self, expire_at: float, info: bytes) -> None:
        self.calls.append(("refresh", expire_at, info))

    def channels(self) -> list[str]:
        return ["news"]


@pytest.fixture
def session() -> RecordedSession:
    return RecordedSession()


@pytest.fixture
def client(session: RecordedSession) -> ConnectedClient:
    return ConnectedClient(session, "js", "1.0", {"origin": "http://a"}, "10.0.0.1", b'{"plan":"gold"}')


def act(client: ConnectedClient) -> None:
    client.send([1])
    client.disconnect()
    client.subscribe("news", Grant(info=1))
    client.subscribe("sport")
    client.unsubscribe("news")
    client.refresh(5, {"name": "A."})
    client.refresh()


def test_a_client_shows_the_identity_and_the_software_of_its_session(client: ConnectedClient) -> None:
    assert (client.id, client.user, client.info, client.meta) == ("c1", "ann", {"name": "Ann"}, {"plan": "gold"})
    assert (client.name, client.version, client.remote_address) == ("js", "1.0", "10.0.0.1")
    assert client.headers == {"origin": "http://a"} and client.channels == ["news"]


def test_its_methods_act_on_the_session(session: RecordedSession, client: ConnectedClient) -> None:
    act(client)
    assert session.calls == [
        ("send", [1]),
        ("disconnect", 3503, "force disconnect"),
        ("subscribe", "news", SubscribeOptions(b"1"), None),
        ("subscribe", "sport", SubscribeOptions(), None),
        ("unsubscribe", "news", 2000, "server unsubscribe"),
        ("refresh", 5, b'{"name":"A."}'),
        ("refresh", 0.0, b""),
    ]


def test_after_the_end_of_the_session_its_methods_do_nothing(session: RecordedSession, client: ConnectedClient) -> None:
    release(client)
    act(client)
    assert session.calls == []
    assert (client.id, client.user, client.info, client.channels) == ("c1", "ann", {"name": "Ann"}, [])


def test_content_is_one_line_of_json() -> None:
    assert encode_content(None) == b"" and encode_content(msgspec.Raw(b"[1,\n2]")) == b"[1,2]"
    with pytest.raises(TypeError):
        encode_content(object())


def test_a_grant_becomes_options_of_a_subscription() -> None:
    grant = Grant(data=1, info={"n": 2}, expire_at=7, override={"presence": True})
    assert subscribe_options(grant) == SubscribeOptions(b'{"n":2}', b"1", 7.0, {"presence": True})


@pytest.mark.parametrize(
    "grant", [Grant(override={"history": True}), Grant(override={"presence": 3}), Grant(expire_at="7")]
)
def test_an_invalid_grant_is_a_value_error(grant: Grant) -> None:
    with pytest.raises(ValueError):
        subscribe_options(grant)


def test_the_state_is_one_dict_and_outlives_the_session(client: ConnectedClient) -> None:
    assert client.state == {}
    client.state["a"] = 1
    release(client)
    assert client.state == {"a": 1}
