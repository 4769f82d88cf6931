"""A sample of the recorded conversations gets the recorded answers, of one worker and of two."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.clients import client_of
from tests.conformance.corpus import Event, chosen, configuration, conversations, profiles
from tests.conformance.known_faults import KnownFaults
from tests.conformance.memory import Memory
from tests.conformance.player import play_all
from tests.system.serving import Server, ServerStarter

LIMIT = 60.0

# Families among the known faults of which the corpus has no conversation.
ABSENT = {"binary frame*"}


def in_own_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with ThreadPoolExecutor(1) as thread:  # the loop of this thread belongs to the reactor
        return thread.submit(asyncio.run, coroutine).result()


def started(start_server: ServerStarter, folder: Path, profile: str, workers: int) -> Server:
    config = folder / f"{profile}.toml"
    config.write_text(configuration(profile))
    return start_server("--workers", str(workers), config=config)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("profile", profiles())
def test_the_answers_are_those_of_centrifugo(
    profile: str, workers: int, start_server: ServerStarter, tmp_path: Path
) -> None:
    server = started(start_server, tmp_path, profile, workers)
    known = KnownFaults.read()
    sample = chosen(conversations(profile), quick=True)

    found = in_own_loop(play_all(sample, server.port, known))

    if new := [str(one) for one in found if not known.covers(one)]:
        pytest.fail(f"{len(new)} of {len(sample)} conversations differ\n\n" + "\n\n".join(new), pytrace=False)


def test_the_known_faults_name_families_that_exist() -> None:
    corpus = [one for profile in profiles() for one in conversations(profile)]
    unknown = {line.pattern for line in KnownFaults.read().lines if not any(map(line.names, corpus))}

    assert unknown <= ABSENT, "no conversation has such a name"


async def last_answer(port: int, *messages: list[dict[str, Any]]) -> Event:
    """The answer to the last of the messages that a new client sends."""
    memory = Memory()
    client = client_of(memory, port, {"open": "A", "transport": "websocket"})
    try:
        await client.open()
        for message in messages:
            seen = len(client.events)
            await client.send(message)
            async with asyncio.timeout(LIMIT):
                while len(client.events) == seen:
                    memory.changed.clear()
                    await memory.changed.wait()
        return client.events[-1]
    finally:
        await client.close()


def test_messages_that_end_a_centrifugo_are_refused(start_server: ServerStarter, tmp_path: Path) -> None:
    server = started(start_server, tmp_path, "main", workers=1)
    null_subscription = [{"id": 1, "connect": {"subs": {"plain:a": None}}}]
    null_filter = [{"id": 2, "subscribe": {"channel": "tf:a", "tf": {"op": "and", "nodes": [None]}}}]
    connect = [{"id": 1, "connect": {}}]

    for messages in ([null_subscription], [connect, null_filter]):
        kind, *values = in_own_loop(last_answer(server.port, *messages))
        assert kind == "closed" or "error" in values[0], values
    kind, reply = in_own_loop(last_answer(server.port, connect))
    assert kind == "message" and "connect" in reply
