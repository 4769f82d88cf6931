"""The player has a conversation with a server: it does each step and collects the answers."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.conformance.clients import Client, client_of
from tests.conformance.comparison import Difference, difference, same
from tests.conformance.corpus import Answers, Conversation, Event, Step
from tests.conformance.known_faults import KnownFaults
from tests.conformance.memory import Memory
from tests.conformance.responses import NETWORK_ERRORS, Response

API_KEY = "k"  # http_api.key of the profiles
API_LIMIT = 30.0  # seconds for a call of the API
CONVERSATION_LIMIT = 300.0
ENOUGH = 100  # differences: more of them need no confirmation

IDENTITY = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}(?!/)")  # and not the node at the beginning of a session's secret


@dataclass(frozen=True)
class Pace:
    """How many conversations are played at a time, and in seconds how long each waits.

    patience: for answers that are wanted. settle: for others, which nothing announces.
    """

    at_a_time: int
    patience: float
    settle: float


# A difference counts only if it comes again at each of the slower paces.
PACES = (Pace(16, 3.0, 0.025), Pace(6, 10.0, 0.08), Pace(2, 20.0, 0.25))


class Player:
    """Plays one conversation. The port is that of the clients and the API. faulty: expect the answers of old too."""

    def __init__(self, port: int, pace: Pace, conversation: Conversation, faulty: bool) -> None:
        self._port = port
        self._today = conversation.today if faulty else {}
        self._pace = pace
        self._conversation = conversation
        self._memory = Memory()
        self._clients: dict[str, Client] = {}
        self._seen: dict[str, int] = {}  # by client: the number of its events in earlier steps

    async def play(self) -> Difference | None:
        """The difference between the answers and the wanted ones, if there is one."""
        try:
            return difference(self._conversation, await asyncio.wait_for(self._answers(), CONVERSATION_LIMIT))
        except NETWORK_ERRORS as error:
            return Difference(self._conversation, 0, f"the player failed: {error!r}")

    async def _answers(self) -> list[Answers]:
        """The answers step by step, to the first step whose answers are neither the wanted nor the faulty ones."""
        if self._conversation.slow:
            await asyncio.sleep(1.02 - time.time() % 1)  # tokens count whole seconds: begin with one
        answers: list[Answers] = []
        try:
            for number, step in enumerate(self._conversation.steps):
                expected = self._expected(number)
                answers.append(await self._answers_to(step, expected, last=number == len(self._conversation.steps) - 1))
                if not any(same(one, answers[-1]) for one in expected):
                    break
        finally:
            await asyncio.gather(*(client.close() for client in self._clients.values()))
        return answers

    def _expected(self, number: int) -> list[Answers]:
        """The wanted answers to a step, and the faulty ones that are known."""
        wanted = self._conversation.wanted[number]
        return [wanted, self._today[number]] if number in self._today else [wanted]

    async def _answers_to(self, step: Step, expected: list[Answers], last: bool) -> Answers:
        self._seen = {name: len(client.events) for name, client in self._clients.items()}
        response = await self._act(step)
        await self._wait_for(expected)
        await asyncio.sleep(self._pace.settle * (3 if last or len(expected) > 1 else 1))
        events = {name: client.events[self._seen.get(name, 0) :] for name, client in self._clients.items()}
        if response:
            events["response"] = [response]
        return {name: [self._memory.normalised(one) for one in events[name]] for name in sorted(events) if events[name]}

    async def _act(self, step: Step) -> Event | None:
        """Do a step. Returns the response to a request that no client sends."""
        if "open" in step:
            client = self._clients[step["open"]] = client_of(self._memory, self._port, step)
            self._seen[client.name] = 0
            await client.open()
        elif "send" in step:
            await self._clients[step["send"]].send(step["commands"], step.get("frame"))
        elif "close" in step:
            await self._clients[step["close"]].close()
        elif "sleep" in step:
            await asyncio.sleep(step["sleep"])
        elif "api" in step:
            return await self._call_api(step)
        elif "http" in step:
            return await self._request(step)
        return None

    async def _call_api(self, step: Step) -> Event:
        headers = {"X-API-Key": API_KEY, "Content-Type": "application/json", "Connection": "close"}
        params = json.dumps(self._memory.fill(step["params"])).encode()
        response = await Response(self._port, "POST", f"/api/{step['api']}", headers, params).start()
        body = _body_value(await response.body(API_LIMIT))
        return ["api", body] if response.status == 200 else ["api", response.status, body]

    async def _request(self, step: Step) -> Event:
        body = self._memory.fill(step.get("body"))
        body = body.encode() if isinstance(body, str) else body
        headers = self._memory.fill(step.get("headers") or {})
        response = Response(self._port, step["http"], step["path"], headers, body)
        try:
            await response.start()
            # A stream has no end: only its first bytes count.
            received = b"" if step["http"] == "HEAD" else await response.body(20 * self._pace.settle)
        except NETWORK_ERRORS as error:
            return ["http", type(error).__name__]
        finally:
            response.close()
        value = _body_value(received) if response.status == 200 else ""
        return ["http", response.status, response.compared_headers(), value]

    async def _wait_for(self, expected: list[Answers]) -> None:
        """Wait until each client has had as many events as in one of the expected answers, or patience ends."""

        def complete() -> bool:
            return any(
                all(
                    len(client.events) - self._seen.get(name, 0) >= len(answers.get(name, ()))
                    for name, client in self._clients.items()
                )
                for answers in expected
            )

        try:
            async with asyncio.timeout(self._pace.patience):
                while not complete():
                    self._memory.changed.clear()
                    await self._memory.changed.wait()
        except TimeoutError:
            pass


def _body_value(data: bytes) -> Any:
    """The body of a response as JSON or as text, without ids."""
    text = IDENTITY.sub("<id>", data.decode("latin1").strip().removeprefix("data:"))
    try:
        return json.loads(text)
    except ValueError:
        return text


async def _play_at(
    pace: Pace, port: int, among: Iterable[Conversation], enough: int | None, known: KnownFaults
) -> dict[Conversation, Difference | None]:
    """Play until the end, or until `enough` differences are found that are not known."""
    found: dict[Conversation, Difference | None] = {}
    unknown = 0

    async def work(queue: list[Conversation]) -> None:
        nonlocal unknown
        while queue and (enough is None or unknown < enough):
            conversation = queue.pop()
            one = found[conversation] = await Player(port, pace, conversation, known.affect(conversation)).play()
            unknown += one is not None and not known.covers(one)

    among = list(among)[::-1]
    together = [one for one in among if not one.alone]
    await asyncio.gather(*(work(together) for _ in range(pace.at_a_time)))
    await work([one for one in among if one.alone])
    return found


async def play_all(
    among: list[Conversation], port: int, known: KnownFaults, paces: tuple[Pace, ...] = PACES
) -> list[Difference]:
    """All differences; known faults are among them."""
    found: dict[Conversation, Difference | None] = {}
    again = among
    for number, pace in enumerate(paces):
        found |= await _play_at(pace, port, again, ENOUGH if number else None, known)
        again = [one for one in again if (its := found[one]) and not known.covers(its)]
        if not again or (number and len(again) >= ENOUGH):
            break
    return [its for one in among if (its := found[one])]
