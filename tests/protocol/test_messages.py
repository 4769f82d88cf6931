"""The messages of the client protocol as Structs: the one request of a command, and parts of replies and pushes."""

from __future__ import annotations

import pytest
from msgspec import UNSET, Raw

from realtime.protocol import messages
from realtime.protocol.messages import Command, ProtocolError, RPCRequest, SendRequest
from realtime.types import ClientInfo, Publication


@pytest.mark.parametrize("name", messages.REQUESTS)
def test_a_command_names_its_one_request(name):
    request = type(name, (), {})()
    assert Command(id=1, **{name: request}).request() == (name, request)


def test_an_empty_command_is_a_pong():
    assert Command().request() == ("", None)


@pytest.mark.parametrize(
    "command",
    [
        Command(id=1),
        Command(ping=Raw(b"{}")),
        Command(id=1, rpc=RPCRequest(), ping=Raw(b"{}")),
        Command(id=1, rpc=RPCRequest(), send=SendRequest()),
    ],
)
def test_an_id_without_a_request_two_requests_and_a_ping_are_invalid(command):
    with pytest.raises(ProtocolError):
        command.request()


def test_a_publication_carries_its_publisher_and_the_given_data():
    publication = Publication(b"1", 7, ClientInfo("ann", "c1", b'{"n":1}'), {"kind": "news"})
    pub = messages.make_pub(publication, b"2", "epoch", delta=True)
    assert (bytes(pub.data), pub.offset, pub.tags, pub.epoch, pub.delta) == (b"2", 7, {"kind": "news"}, "epoch", True)
    assert pub.info == messages.Info("ann", "c1", pub.info.conn_info, UNSET)
    assert bytes(pub.info.conn_info) == b'{"n":1}'


def test_absent_json_text_omits_its_key():
    assert messages.embed(b"") is UNSET
    assert bytes(messages.embed(b"null")) == b"null"


def test_bytes_that_are_not_json_are_for_encodings_that_carry_any_bytes():
    assert messages.embed(b"\0\xff") is UNSET
    assert bytes(messages.embed_bytes(b"\0\xff")) == b"\xff"
    assert bytes(messages.embed_bytes(b"null")) == b"null"
    assert messages.embed_bytes(b"") is UNSET
