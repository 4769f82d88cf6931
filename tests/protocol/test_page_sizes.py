"""Pages of history and recoveries stay well below the limit of an outbox."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings
from realtime.protocol.wire_formats import WireFormat
from tests.protocol.sessions import BARE, BARE_PROTOBUF, Peer, Server

QUEUE = 20_000
OPTIONS = ChannelOptions(
    history_size=100,
    history_ttl=60.0,
    force_recovery=True,
    allowed_delta_types=("fossil",),
    allow_subscribe_for_client=True,
    allow_subscribe_for_anonymous=True,
    allow_history_for_client=True,
    allow_history_for_anonymous=True,
)


@pytest.fixture
def server() -> Server:
    return Server(
        ChannelSettings(without_namespace=OPTIONS),
        queue_max_size=QUEUE,
        recovery_reply_size=QUEUE // 2,
        allow_anonymous_connect_without_token=True,
    )


def connected(server: Server, form: WireFormat = BARE) -> Peer:
    peer = server.peer(form)
    peer.connect()
    return peer


def page(peer: Peer, **request: Any) -> list[int]:
    """Return the offsets of one page of history."""
    (reply,) = peer.say({"id": 2, "history": {"channel": "c", "limit": 300, **request}})
    return [publication["offset"] for publication in reply["history"]["publications"]]


@pytest.mark.parametrize("form", [BARE, BARE_PROTOBUF], ids=["json", "protobuf"])
def test_paging_reads_the_whole_history(server: Server, form: WireFormat) -> None:
    peer = connected(server, form)
    server.publish("c", *("x" * 1000 for _ in range(40)))
    pages, since = [], 0
    while since < 40:
        pages.append(page(peer, since={"offset": since}))
        since = pages[-1][-1]
    assert [offset for one in pages for offset in one] == list(range(1, 41))
    assert {len(one) for one in pages[:-1]} == {9}
    assert page(peer, reverse=True) == list(range(40, 31, -1))


def test_a_page_has_at_least_one_publication(server: Server) -> None:
    peer = connected(server)
    server.publish("c", "x" * 50_000, 2)
    assert page(peer) == [1]


@pytest.mark.parametrize("length", [1, 10, 100, 300])
def test_data_that_grows_by_encoding_fits_too(server: Server, length: int) -> None:
    """Subscribers with deltas receive data as a string, in which every quote is escaped."""
    peer = connected(server)
    server.publish("c", *([""] * length for _ in range(100)))
    (reply,) = peer.say({"id": 2, "history": {"channel": "c", "limit": 300}})
    offset = 100 - len(reply["history"]["publications"])
    peer.session.receive(b'{"id":3,"subscribe":{"channel":"c","recover":true,"delta":"fossil","offset":%d}}' % offset)
    (raw,) = peer.raw
    assert b'"recovered":true' in raw
    assert len(raw) < QUEUE
