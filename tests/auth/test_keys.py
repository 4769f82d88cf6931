"""Key sets: what is read of them, when they are fetched, and what holds while they can not be; by our own clock."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from realtime.auth.keys import (
    LIFETIME,
    MAX_KEYS,
    MAX_SET_BYTES,
    RENEWAL_WINDOW,
    RETRY_INTERVAL,
    KeySets,
    VerificationKey,
    is_public,
    key_set,
)
from realtime.errors import KeysUnavailable

RSA = rsa.generate_private_key(65537, 2048)
P256, P384, P521 = (ec.generate_private_key(curve) for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()))
EDWARDS = ed25519.Ed25519PrivateKey.generate()
_FAMILIES = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256"}


def web_key(private: Any, **members: Any) -> dict[str, Any]:
    name = next((name for kind, name in _FAMILIES.items() if isinstance(private, kind)), "EdDSA")
    described = jwt.get_algorithm_by_name(name).to_jwk(private.public_key(), as_dict=True)
    return {**described, "kid": "k", "use": "sig", **members}


def of(*entries: Any) -> dict[str, VerificationKey]:
    return key_set(json.dumps({"keys": entries}).encode())


# What is read.


@pytest.mark.parametrize(
    ("private", "members", "algorithms"),
    [
        (RSA, {}, ("RS256", "RS384", "RS512")),
        (RSA, {"alg": "RS512"}, ("RS512",)),
        (RSA, {"alg": "PS256"}, ("PS256",)),
        (RSA, {"alg": "PS512"}, ("PS512",)),
        (P256, {}, ("ES256",)),
        (P384, {"alg": "ES384"}, ("ES384",)),
        (P521, {}, ("ES512",)),
        (EDWARDS, {}, ("EdDSA",)),
        (EDWARDS, {"alg": "EdDSA"}, ("EdDSA",)),
    ],
)
def test_a_key_verifies_by_its_algorithms_and_by_no_other(
    private: Any, members: dict[str, Any], algorithms: tuple[str, ...]
) -> None:
    key = of(web_key(private, **members))["k"]
    assert key.algorithms == algorithms
    for name in algorithms:
        signature = jwt.get_algorithm_by_name(name).sign(b"text", private)
        assert key.verifies(name, b"text", signature)
        assert not key.verifies(name, b"other", signature)
        assert not key.verifies(name, b"text", b"")
        assert not key.verifies(name, b"text", signature[:-1])
        for other in {"none", "HS256", "RS256", "RS384", "PS256", "ES256", "ES384", "EdDSA", "x"} - set(algorithms):
            assert not key.verifies(other, b"text", signature)


PASSED_OVER = {
    "for encryption": web_key(RSA, use="enc"),
    "for nothing in particular": {name: text for name, text in web_key(RSA).items() if name != "use"},
    "without an id": {name: text for name, text in web_key(RSA).items() if name != "kid"},
    "with an empty id": web_key(RSA, kid=""),
    "with a long id": web_key(RSA, kid="k" * 256),
    "with a number as its id": web_key(RSA, kid=5),
    "a secret": {"kty": "oct", "k": "c2VjcmV0", "kid": "k", "use": "sig"},
    "of an unknown kind": web_key(RSA, kty="XYZ"),
    "of another kind than it says": web_key(RSA, kty="EC"),
    "for an algorithm of another family": web_key(RSA, alg="ES256"),
    "for an algorithm of another curve": web_key(P256, alg="ES384"),
    "for an HMAC": web_key(RSA, alg="HS256"),
    "for no algorithm": web_key(RSA, alg="none"),
    "for another algorithm of its curve": web_key(EDWARDS, alg="ES256"),
    "on a curve that signs no tokens": web_key(ec.generate_private_key(ec.SECP256K1())),
    "of another Edwards curve": web_key(ed448.Ed448PrivateKey.generate()),
    "off its curve": web_key(P256, x=base64.urlsafe_b64encode(b"\1" * 32).decode().rstrip("=")),
    "too short": web_key(rsa.generate_private_key(65537, 1024)),
    "too long": web_key(RSA, n="_" * 4096),
    "without its numbers": {"kty": "RSA", "kid": "k", "use": "sig"},
    "with numbers that are none": web_key(RSA, n="!!!", e="???"),
    "with numbers as numbers": web_key(RSA, n=5, e=3),
    "with an even exponent": web_key(RSA, e="AAAE"),
    "no object": "k",
    "null": None,
}


@pytest.mark.parametrize("entry", PASSED_OVER.values(), ids=PASSED_OVER)
def test_what_can_not_be_used_is_passed_over(entry: Any) -> None:
    assert set(of(entry, web_key(P256, kid="good"))) == {"good"}


def test_the_first_of_two_keys_with_one_id_counts() -> None:
    assert of(web_key(RSA), web_key(P256))["k"].algorithms == ("RS256", "RS384", "RS512")


def test_the_private_part_of_a_key_is_not_read() -> None:
    whole = jwt.get_algorithm_by_name("RS256").to_jwk(RSA, as_dict=True)
    key = of({**whole, "kid": "k", "use": "sig", "d": "!", "x5u": "http://127.0.0.1/"})["k"]
    assert isinstance(key.material, rsa.RSAPublicKey)


def test_so_many_keys_and_no_more() -> None:
    described = web_key(P256)
    keys = of(*({**described, "kid": str(number)} for number in range(MAX_KEYS + 10)))
    assert list(keys) == [str(number) for number in range(MAX_KEYS)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<!doctype html>",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": null}',
        b'{"keys": [}',
        b'{"keys": ["\xff"',
        b"[" * 100_000,
        b'{"keys": []}' + b" " * MAX_SET_BYTES,
    ],
)
def test_what_is_no_key_set(text: bytes) -> None:
    with pytest.raises(KeysUnavailable):
        key_set(text)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_key_set_or_are_not(text: bytes) -> None:
    with contextlib.suppress(KeysUnavailable):
        key_set(text)


_values = (
    st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["RSA", "EC", "OKP", "sig", "P-256", "AQAB"])
)


@given(st.dictionaries(st.sampled_from(["kty", "kid", "use", "alg", "n", "e", "crv", "x", "y", "d"]), _values))
def test_any_entry_is_a_key_or_is_passed_over(entry: dict[str, Any]) -> None:
    of({"kty": "RSA", "kid": "k", "use": "sig", **entry})


# When it is fetched.

HERE = "https://id.example/keys"
ONE = {"one": VerificationKey((), None)}
TWO = {"two": VerificationKey((), None)}


class World:
    """Key sets whose fetches the test ends."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.fetches: list[tuple[str, asyncio.Future[Mapping[str, VerificationKey]]]] = []
        self.sets = KeySets(self._fetch, asyncio.ensure_future, lambda: self.now)

    async def _fetch(self, endpoint: str) -> Mapping[str, VerificationKey]:
        outcome: asyncio.Future[Mapping[str, VerificationKey]] = asyncio.get_running_loop().create_future()
        self.fetches.append((endpoint, outcome))
        return await outcome

    async def ask(self, kid: str = "one", endpoint: str = HERE) -> asyncio.Task[VerificationKey | None]:
        asking = asyncio.create_task(self.sets.key(endpoint, kid))
        await settle()
        return asking

    async def answer(self, keys: Mapping[str, VerificationKey] | None) -> None:
        """End the latest fetch: with keys, or in vain."""
        _, outcome = self.fetches[-1]
        if keys is None:
            outcome.set_exception(KeysUnavailable("away"))
        else:
            outcome.set_result(keys)
        await settle()

    async def fetched(self, keys: Mapping[str, VerificationKey] | None, kid: str = "one") -> None:
        """Have a question end in a fetch with this outcome."""
        asking = await self.ask(kid)
        await self.answer(keys)
        await asyncio.wait([asking])
        assert asking.exception() is None if keys is not None else isinstance(asking.exception(), KeysUnavailable)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def in_a_loop(test: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on a loop of its own: that of the test run is busy with the reactor."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, test).result()


def test_a_set_is_fetched_once_for_all_who_wait() -> None:
    async def test() -> None:
        world = World()
        asking = [await world.ask(kid) for kid in ("one", "one", "two") for _ in range(333)]
        assert len(world.fetches) == 1
        await world.answer(ONE)
        found = [await one for one in asking]
        assert found == [ONE["one"]] * 666 + [None] * 333
        assert await (await world.ask()) is ONE["one"]
        assert len(world.fetches) == 1

    in_a_loop(test())


def test_a_key_of_that_id_in_another_set_is_another_key() -> None:
    async def test() -> None:
        world = World()
        await world.fetched(ONE)
        other = {"one": VerificationKey(("ES256",), None)}
        asking = await world.ask(endpoint="https://other.example/keys")
        assert [endpoint for endpoint, _ in world.fetches] == [HERE, "https://other.example/keys"]
        await world.answer(other)
        assert await asking is other["one"]
        assert await (await world.ask()) is ONE["one"]

    in_a_loop(test())


def test_an_unknown_key_has_the_set_fetched_but_not_again_and_again() -> None:
    async def test() -> None:
        world = World()
        await world.fetched(ONE)
        for _ in range(1000):
            # Whether it exists is not known: that is not the token's fault.
            with pytest.raises(KeysUnavailable):
                await (await world.ask("two"))
        assert len(world.fetches) == 1
        world.now += RETRY_INTERVAL
        asking = await world.ask("two")
        assert await (await world.ask("one")) is ONE["one"]  # nobody who has a key waits
        await world.answer(ONE | TWO)
        assert await asking is TWO["two"]

    in_a_loop(test())


def test_a_key_that_is_gone_from_the_set_is_gone() -> None:
    async def test() -> None:
        world = World()
        await world.fetched(ONE)
        world.now += RETRY_INTERVAL
        await world.fetched(TWO, "two")
        world.now += RETRY_INTERVAL
        asking = await world.ask("one")
        await world.answer(TWO)
        assert await asking is None

    in_a_loop(test())


def test_keys_serve_through_an_outage_to_the_end_of_their_time() -> None:
    async def test() -> None:
        world = World()
        await world.fetched(ONE)
        world.now += RETRY_INTERVAL
        await world.fetched(None, "two")
        end = 1000 + LIFETIME
        for world.now in (end - RENEWAL_WINDOW, end - RENEWAL_WINDOW + RETRY_INTERVAL, end - 0.1):
            assert await (await world.ask()) is ONE["one"]
            await world.answer(None)
        world.now = end + RETRY_INTERVAL
        await world.fetched(None)
        # It is back: the next attempt finds it.
        world.now += RETRY_INTERVAL
        await world.fetched(ONE)
        assert await (await world.ask()) is ONE["one"]

    in_a_loop(test())


def test_a_set_is_renewed_while_it_still_serves() -> None:
    async def test() -> None:
        world = World()
        await world.fetched(ONE)
        world.now += LIFETIME - RENEWAL_WINDOW - 1
        await world.ask()
        assert len(world.fetches) == 1
        world.now += 1
        assert await (await world.ask()) is ONE["one"]
        assert await (await world.ask()) is ONE["one"]
        assert len(world.fetches) == 2
        await world.answer(ONE)
        world.now += RENEWAL_WINDOW
        assert await (await world.ask()) is ONE["one"]
        assert len(world.fetches) == 2

    in_a_loop(test())


def test_before_the_first_set_is_there_nothing_is_judged() -> None:
    async def test() -> None:
        world = World()
        asking = [await world.ask() for _ in range(1000)]
        await world.answer(None)
        for one in asking:
            with pytest.raises(KeysUnavailable):
                await one
        for _ in range(1000):
            with pytest.raises(KeysUnavailable):
                await (await world.ask())
        assert len(world.fetches) == 1
        world.now += RETRY_INTERVAL
        await world.fetched(ONE)

    in_a_loop(test())


def test_a_fetch_that_takes_long_stays_the_only_one() -> None:
    async def test() -> None:
        world = World()
        first = await world.ask()
        world.now += 10 * RETRY_INTERVAL
        second = await world.ask()
        assert len(world.fetches) == 1
        await world.answer(ONE)
        assert await first is await second is ONE["one"]

    in_a_loop(test())


def test_a_mistake_of_ours_is_seen_and_leaves_nothing_behind() -> None:
    async def test() -> None:
        world = World()
        asking = await world.ask()
        world.fetches[-1][1].set_exception(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await asking
        world.now += RETRY_INTERVAL
        await world.fetched(ONE)

    in_a_loop(test())


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 1.0, RETRY_INTERVAL, RENEWAL_WINDOW, LIFETIME]),
            st.sampled_from(["one", "two"]),
            st.booleans(),
        )
    )
)
def test_an_hour_and_ten_seconds_hold_in_every_order(steps: list[tuple[float, str, bool]]) -> None:
    """What is served was fetched within the hour; nobody is asked twice in ten seconds; None is the provider's word."""

    async def test() -> None:
        world = World()
        tried, fetched = [], -LIFETIME
        for wait, kid, up in steps:
            world.now += wait
            before = len(world.fetches)
            asking = await world.ask(kid)
            if len(world.fetches) > before:
                tried.append(world.now)
                await world.answer(ONE if up else None)
                fetched = world.now if up else fetched
            (outcome,) = await asyncio.gather(asking, return_exceptions=True)
            if isinstance(outcome, VerificationKey):
                assert kid == "one"
                assert world.now - fetched < LIFETIME or fetched == world.now
            elif outcome is None:
                assert (kid, fetched) == ("two", world.now)
            else:
                assert isinstance(outcome, KeysUnavailable)
        assert all(later - earlier >= RETRY_INTERVAL for earlier, later in itertools.pairwise(tried))

    in_a_loop(test())


# Where it may come from.


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "2001:db8::1",
        "::127.0.0.1",
        "::ffff:0:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a00:1",
        "2002:a00:1::1",
        "fec0::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
