"""Deltas with the official JavaScript SDK, unmodified: it counts what it got, and stops at any that does not fit."""

from __future__ import annotations

import pytest

from tests.system.serving import ServerStarter, run_node

PRICES = {
    "name": "prices",
    "allowed_delta_types": ["fossil"],
    "delta_publish": True,
    "history_size": 1000,
    "history_ttl": "60s",
    "force_recovery": True,
    "allow_subscribe_for_client": True,
    "allow_publish_for_subscriber": True,
}


@pytest.mark.node
def test_deltas_over_json_and_protobuf_and_a_reconnect(start_server: ServerStarter) -> None:
    server = start_server(channel={"namespaces": [PRICES]})
    seen = run_node("deltas.mjs", server.endpoint, server.port)

    assert seen["same"] == [True] * 3
    assert seen["disorder"] == [""] * 3
    assert seen["recovered"] == [True, True]
    for name in ("json", "binary"):
        assert seen["before"][name]["numFullPayloads"] == 1
        assert seen["before"][name]["numDeltaPayloads"] == 29
        # The first of what was recovered is whole again; what follows it live is not.
        assert seen["after"][name]["numFullPayloads"] == 2
        assert seen["after"][name]["numDeltaPayloads"] == 48
        assert seen["after"][name]["bytesReceived"] < 0.2 * seen["after"][name]["bytesDecoded"]
    assert seen["late"] == [1, "short", 2]
    assert seen["lateStats"]["numFullPayloads"] == 3
