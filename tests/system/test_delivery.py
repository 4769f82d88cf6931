"""What the product promises: nothing is lost, repeated or swapped without a word, whatever process dies."""

from __future__ import annotations

import pytest

from tests.system.serving import Server, ServerStarter, run_node, wait_until

pytestmark = pytest.mark.node


def test_two_clients_on_two_workers_exchange_4_000_messages_in_order(start_server: ServerStarter) -> None:
    server = start_server(client={"commands_per_second": 0})  # it takes them faster than the limit
    seen = run_node("exchange.mjs", server.endpoint, 2_000)

    assert seen["workers"][0] != seen["workers"][1]
    assert set(seen["workers"]) == set(server.workers())
    assert seen["heard"] == [4_000, 4_000]
    assert seen["disorder"] == ["", ""]
    assert seen["outOfTurn"] == ["", ""]


@pytest.mark.parametrize("victim", [0, -1], ids=["the listener's worker", "the speaker's worker"])
def test_a_worker_killed_mid_stream_costs_no_message(server: Server, victim: int) -> None:
    before = set(server.workers())
    seen = run_node("killing.mjs", server.endpoint, 600, victim)

    assert seen["accepted"] == 600
    assert seen["missing"] == []
    assert seen["backwards"] == 0
    assert all(context["recovered"] for context in seen["subscribed"][1:] + seen["speakerSubscribed"][1:])
    assert len(seen["subscribed"]) + len(seen["speakerSubscribed"]) == 3
    wait_until(lambda: len(server.workers()) == 2, "a new worker in the slot")
    assert len(before & set(server.workers())) == 1


def test_a_dead_broker_is_told_never_a_silent_gap(server: Server) -> None:
    seen = run_node("broker.mjs", server.endpoint, server.broker())

    assert seen["connections"] == ["connected", "connected"]
    for contexts in (seen["speaker"], seen["listener"]):
        first, last = contexts[0], contexts[-1]
        assert last["epoch"] != first["epoch"]
        assert next(context["recovered"] for context in contexts if context["epoch"] != first["epoch"]) is False
        assert all(context["wasRecovering"] for context in contexts[1:])
    assert seen["before"] == list(range(1, 21))
    assert seen["after"] in (list(range(21, 41)), list(range(22, 41)))
    assert (seen["disorderBefore"], seen["disorderAfter"]) == ("", "")


def test_a_channel_without_history_goes_on_over_a_dead_broker(start_server: ServerStarter) -> None:
    """Nobody is told anything there, as nothing was promised; but what comes afterwards must arrive."""
    server = start_server()
    seen = run_node("plain.mjs", server.endpoint, server.broker())

    assert seen == {"before": ["before"], "after": "after", "resubscribed": 0}
