"""Key sets from a real HTTP server, which answers well or badly."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from ipaddress import ip_address
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from twisted.internet import reactor, ssl
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import globalLogPublisher

from realtime.auth.keys import MAX_SET_BYTES, RETRY_INTERVAL, KeySets
from realtime.auth.tokens import TokenInvalid, TokenVerifier
from realtime.config.settings import ClientSettings, SubscriptionTokenSettings, TokenSettings
from realtime.errors import KeysUnavailable
from realtime.handlers.coroutines import start_future
from realtime.metrics import Metrics
from realtime.worker import key_sets
from realtime.worker.key_sets import ATTEMPTS, MAX_LOOKUPS, KeySetFetcher, make_verifier
from tests.driving import on_loop

NOW = 1_700_000_000.0
ONE, TWO = (rsa.generate_private_key(65537, 2048) for _ in range(2))


def published(**keys: Any) -> bytes:
    algorithm = jwt.get_algorithm_by_name("RS256")
    entries = [
        algorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": kid, "use": "sig"} for kid, key in keys.items()
    ]
    return json.dumps({"keys": entries}).encode()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


class Provider:
    """An HTTP server whose response is a function of the path; None: it sends no response."""

    def __init__(self, respond: Callable[[str, Any], bytes | None], context: Any = None) -> None:
        self.requests: list[str] = []
        self.connections = 0
        provider = self

        class Server(Protocol):
            received = b""

            def connectionMade(self) -> None:
                provider.connections += 1

            def dataReceived(self, data: bytes) -> None:
                self.received += data
                if b"\r\n\r\n" in self.received:
                    path = self.received.split(b" ")[1].decode()
                    provider.requests.append(path)
                    self.received = b""
                    text = respond(path, self.transport)
                    if text is not None:
                        self.transport.write(text)

            def connectionLost(self, reason: Any) -> None:
                provider.connections -= 1

        factory = Factory.forProtocol(Server)
        listen: Any = reactor
        if context is None:
            self._port = listen.listenTCP(0, factory, interface="127.0.0.1")
        else:
            self._port = listen.listenSSL(0, factory, context, interface="127.0.0.1")
        self.scheme = "http" if context is None else "https"

    def at(self, path: str = "/keys", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self._port.getHost().port}{path}"

    async def stop(self) -> None:
        await self._port.stopListening()


@pytest.fixture
def provide():
    """Return a function that starts providers; they end with the test."""
    providers = []

    def start(respond: Callable[[str, Any], bytes | None], **arguments: Any) -> Provider:
        providers.append(Provider(respond, **arguments))
        return providers[-1]

    yield start
    for provider in providers:
        provider._port.stopListening()


@pytest.fixture
def logged():
    lines: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(lines.append)
    yield lines
    globalLogPublisher.removeObserver(lines.append)


def fetcher(metrics: Metrics | None = None, **arguments: Any) -> KeySetFetcher:
    return KeySetFetcher(reactor, metrics or Metrics(), **{"allow_insecure": True, **arguments})


def outcomes(metrics: Metrics) -> dict[str, float]:
    return {dict(sample.labels)["outcome"]: sample.value for sample in metrics.snapshot()}


@on_loop
async def test_a_key_set(provide: Any) -> None:
    metrics = Metrics()
    provider = provide(lambda path, _: answer(published(one=ONE, two=TWO), "200 OK", "Content-Type: text/plain"))
    keys = await fetcher(metrics)(provider.at("/keys?tenant=acme"))
    assert set(keys) == {"one", "two"}
    assert provider.requests == ["/keys?tenant=acme"]
    assert outcomes(metrics) == {"good": 1, "failed": 0}


@on_loop
async def test_a_key_set_in_chunks_and_one_without_a_length(provide: Any) -> None:
    text = published(one=ONE)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(text), text)
    provider = provide(lambda path, _: chunked)
    assert set(await fetcher()(provider.at())) == {"one"}

    def to_the_end(path: str, transport: Any) -> bytes:
        transport.write(b"HTTP/1.0 200 OK\r\n\r\n" + text)
        transport.loseConnection()
        return b""

    assert set(await fetcher()(provide(to_the_end).at())) == {"one"}


def endless(head: bytes, piece: bytes) -> Callable[[str, Any], None]:
    """Return a response function that sends without an end, as fast as the client reads."""

    def respond(path: str, transport: Any) -> None:
        class Source:
            def resumeProducing(self) -> None:
                transport.write(piece)

            def stopProducing(self) -> None: ...

        transport.write(head)
        transport.registerProducer(Source(), False)

    return respond


OK = b"HTTP/1.1 200 OK\r\n"
FLOOD = b"x" * 65536


def hang_up(path: str, transport: Any) -> None:
    transport.abortConnection()


BAD = {
    "a gigabyte": (endless(OK + b"Content-Length: 1073741824\r\n\r\n", FLOOD), "too many bytes"),
    "a body without a length": (endless(OK + b"\r\n", FLOOD), "exceeds 262144 bytes"),
    "endless chunks": (endless(OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n", FLOOD), "too many bytes"),
    "endless headers": (endless(OK, b"X-Header: 1\r\n" * 5000), "too many bytes"),
    "an endless header": (endless(OK, FLOOD), ""),
    "a body that is a little too large": (lambda path, _: answer(b" " * (MAX_SET_BYTES + 1)), "exceeds 262144 bytes"),
    "an error": (lambda path, _: answer(b"{}", "500 Internal Server Error"), "status 500"),
    "no such path": (lambda path, _: answer(published(one=ONE), "404 Not Found"), "status 404"),
    "nothing": (lambda path, _: answer(b"", "204 No Content"), "status 204"),
    "a page": (lambda path, _: answer(b"<!doctype html>"), "not a JSON Web Key Set"),
    "JSON of another shape": (lambda path, _: answer(b'{"error": "maintenance"}'), "not a JSON Web Key Set"),
    "a body that is cut": (lambda path, t: (t.write(answer(published(one=ONE))[:-5]), t.loseConnection())[1], ""),
    "no HTTP": (lambda path, _: b"SSH-2.0-OpenSSH_9.9\r\n\r\n", ""),
    "garbage": (lambda path, _: bytes(range(256)) * 4, ""),
    "an invalid length": (lambda path, _: b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}", ""),
    "two lengths": (lambda path, _: b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x", ""),
    "the end": (hang_up, ""),
}


@pytest.mark.parametrize(("respond", "reason"), BAD.values(), ids=BAD)
@on_loop
async def test_a_bad_response_is_no_key_set_and_leaves_no_connection(provide: Any, respond: Any, reason: str) -> None:
    metrics = Metrics()
    provider = provide(respond)
    with pytest.raises(KeysUnavailable) as caught:
        await fetcher(metrics)(provider.at())
    assert reason in str(caught.value)
    assert len(provider.requests) == ATTEMPTS
    assert outcomes(metrics) == {"good": 0, "failed": 1}
    await until(lambda: provider.connections == 0)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until the condition holds; the time limit of the test ends a wait in vain."""
    while not holds():
        await asyncio.sleep(0)


@on_loop
async def test_a_slow_server_is_abandoned(provide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "TIMEOUT", 0.05)
    for sends in (None, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"):
        provider = provide(lambda path, _, sends=sends: sends)
        with pytest.raises(KeysUnavailable, match="no response in time"):
            await fetcher()(provider.at())
        assert len(provider.requests) == ATTEMPTS
        await until(lambda provider=provider: provider.connections == 0)


@on_loop
async def test_the_second_attempt_counts(provide: Any) -> None:
    answers = [answer(b"", "503 Service Unavailable"), answer(published(one=ONE))]
    provider = provide(lambda path, _: answers.pop(0))
    assert set(await fetcher()(provider.at())) == {"one"}


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect"])
@on_loop
async def test_a_redirect_is_not_followed(provide: Any, status: str) -> None:
    elsewhere = provide(lambda path, _: answer(published(one=ONE)))
    provider = provide(lambda path, _: answer(published(one=ONE), status, f"Location: {elsewhere.at()}"))
    with pytest.raises(KeysUnavailable, match="status 30"):
        await fetcher()(provider.at())
    assert elsewhere.requests == []
    assert set(provider.requests) == {"/keys"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433"])
@on_loop
async def test_addresses_that_are_not_public_get_no_connection(provide: Any, host: str) -> None:
    provider = provide(lambda path, _: answer(published(one=ONE)))
    address = provider.at(host=host).replace("http:", "https:")
    with pytest.raises(KeysUnavailable, match="not public"):
        await fetcher(allow_insecure=False)(address)
    with pytest.raises(KeysUnavailable, match="not an https address"):
        await fetcher(allow_insecure=False)(provider.at(host=host))
    assert (provider.connections, provider.requests) == (0, [])


@on_loop
async def test_an_allowed_host_is_asked_over_http_and_at_a_private_address(provide: Any) -> None:
    provider = provide(lambda path, _: answer(published(one=ONE)))
    allowing = fetcher(allow_insecure=False, allowed_hosts=("localhost", "keys.auth.svc"))
    assert set(await allowing(provider.at(host="localhost"))) == {"one"}
    for other in ("127.0.0.1", "keys.auth.svc.localhost", "localhost."):
        with pytest.raises(KeysUnavailable, match="not an https address"):
            await allowing(provider.at(host=other))
    with pytest.raises(KeysUnavailable, match="not public"):
        await allowing(provider.at(host="127.0.0.1").replace("http:", "https:"))
    assert provider.requests == ["/keys"]


@on_loop
async def test_the_verifier_of_a_worker_asks_allowed_hosts(provide: Any) -> None:
    provider = provide(lambda path, _: answer(published(one=ONE)))
    table = TokenSettings(jwks_public_endpoint=provider.at(), jwks_allowed_hosts=("127.0.0.1",))
    verifier = make_verifier(ClientSettings(token=table), reactor, Metrics(), lambda: NOW)
    token = jwt.encode({"sub": "42"}, ONE, "RS256", {"kid": "one"})
    assert (await verifier.connection(token)).user == "42"


@on_loop
async def test_a_name_with_one_address_that_is_not_public_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*entry, ("8.8.8.8", 443)), (*entry, ("169.254.169.254", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(KeysUnavailable, match="not public"):
        await fetcher(allow_insecure=False)("https://id.example/keys")


@on_loop
async def test_a_name_that_no_certificate_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(KeysUnavailable, match="certificate"):
        await fetcher(allow_insecure=False)("https://my_tenant.id.example/keys")


@on_loop
async def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(KeysUnavailable, match="not known"):
        await fetcher()("https://id.example/keys")


@on_loop
async def test_name_servers_that_hang_block_a_bounded_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = [], threading.Event()

    def hangs(host: str, *args: Any, **options: Any) -> Any:
        asked.append(host)
        answered.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    monkeypatch.setattr(key_sets, "TIMEOUT", 0.02)
    fetch = fetcher()
    reasons = []
    for _ in range(MAX_LOOKUPS):
        with pytest.raises(KeysUnavailable) as caught:
            await fetch("https://id.example/keys")
        reasons.append(str(caught.value))
    answered.set()
    assert len(asked) == MAX_LOOKUPS
    assert reasons == ["no response in time"] * (MAX_LOOKUPS // ATTEMPTS) + ["the name servers do not answer"] * (
        MAX_LOOKUPS - MAX_LOOKUPS // ATTEMPTS
    )
    await until(lambda: fetch._lookups == 0)


@on_loop
async def test_a_refused_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(KeysUnavailable, match="ConnectionRefusedError"):
        await fetcher()(f"http://127.0.0.1:{port}/keys")


@on_loop
async def test_an_outage_is_logged_once_and_without_passwords(provide: Any, logged: list[dict[str, Any]]) -> None:
    up = False
    provider = provide(lambda path, _: answer(published(one=ONE)) if up else answer(b"", "500 Oops"))
    fetch = fetcher()
    for up in (False, False, True, True):  # noqa: B007
        try:
            await fetch(provider.at("/keys?password=hush-hush"))
        except KeysUnavailable as error:
            assert "hush" not in str(error)
    lines = [event["log_format"].format(**event) for event in logged if event.get("log_namespace") == key_sets.__name__]
    assert lines == [
        "no key set from http://127.0.0.1/keys: status 500; tokens signed with keys that are not known yet are refused",
        "fetched the key set from http://127.0.0.1/keys again",
    ]


# With encryption.


def certificate(*names: x509.GeneralName) -> tuple[Any, Any]:
    """Return the TLS context of a server, and the trust root of its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "realtime tests")])
    now = datetime.now()
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(Encoding.PEM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    trust = ssl.trustRootFromCertificates([ssl.Certificate.loadPEM(pem)])
    return ssl.PrivateCertificate.loadPEM(pem + private).options(), trust


@pytest.mark.filterwarnings("ignore:Passing pyOpenSSL:DeprecationWarning")  # Twisted's own
@on_loop
async def test_https_from_a_server_that_is_trusted_under_its_name(provide: Any) -> None:
    context, trust = certificate(x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1")))
    provider = provide(lambda path, _: answer(published(one=ONE)), context=context)
    for host in ("localhost", "127.0.0.1"):
        assert set(await fetcher(trust=trust)(provider.at(host=host))) == {"one"}
    with pytest.raises(KeysUnavailable):
        await fetcher()(provider.at())  # the platform does not trust it
    context, trust = certificate(x509.DNSName("other.example"))
    provider = provide(lambda path, _: answer(published(one=ONE)), context=context)
    with pytest.raises(KeysUnavailable):
        await fetcher(trust=trust)(provider.at(host="localhost"))
    assert provider.requests == []


@on_loop
async def test_clear_text_where_encryption_is_expected(provide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "TIMEOUT", 0.1)  # each side waits for the other
    provider = provide(lambda path, _: answer(published(one=ONE)))
    with pytest.raises(KeysUnavailable):
        await fetcher()(provider.at().replace("http:", "https:"))


# From a token to the provider.


class World:
    """A verifier that fetches keys from a provider, on a clock that the test moves."""

    def __init__(self, provide: Any, path: str = "/keys", **settings: Any) -> None:
        self.now = 1000.0
        self.sets: dict[str, bytes] = {}
        self.provider = provide(
            lambda path, _: answer(self.sets[path]) if path in self.sets else answer(b"", "503 Out")
        )
        sets = KeySets(fetcher(), start_future, lambda: self.now)
        table = TokenSettings(jwks_public_endpoint=self.provider.at(path), jwks_allow_insecure=True, **settings)
        self.verifier = TokenVerifier(table, partial(float, NOW), sets)

    async def user(self, key: Any, kid: str = "one", **claims: Any) -> str:
        token = jwt.encode({"sub": "42", **claims}, key, "RS256", {"kid": kid})
        return (await self.verifier.connection(token)).user


@on_loop
async def test_rotation(provide: Any) -> None:
    world = World(provide)
    world.sets["/keys"] = published(one=ONE)
    assert await world.user(ONE) == "42"
    world.sets["/keys"] = published(two=TWO)
    assert await world.user(ONE) == "42"  # no token has named another key yet
    world.now += RETRY_INTERVAL
    assert await world.user(TWO, "two") == "42"
    world.now += RETRY_INTERVAL
    with pytest.raises(TokenInvalid):
        await world.user(ONE)
    with pytest.raises(TokenInvalid):
        await world.user(ONE, "two")
    assert len(world.provider.requests) == 3


@on_loop
async def test_an_outage_of_a_minute(provide: Any) -> None:
    world = World(provide)
    with pytest.raises(KeysUnavailable):
        await world.user(ONE)
    world.now += RETRY_INTERVAL
    world.sets["/keys"] = published(one=ONE)
    assert await world.user(ONE) == "42"
    world.sets.clear()
    world.provider.requests.clear()
    for _ in range(60):
        world.now += 1.0
        assert await world.user(ONE) == "42"
        with pytest.raises(KeysUnavailable):
            await world.user(TWO, "two")
    assert len(world.provider.requests) <= 60 / RETRY_INTERVAL * ATTEMPTS


@on_loop
async def test_the_same_key_id_in_two_tenants(provide: Any) -> None:
    world = World(provide, "/{{tenant}}/keys", issuer_regex="^(?P<tenant>acme|globex)$")
    world.sets |= {"/acme/keys": published(one=ONE), "/globex/keys": published(one=TWO)}
    assert await world.user(ONE, iss="acme") == "42"
    assert await world.user(TWO, iss="globex") == "42"
    for key, tenant in ((ONE, "globex"), (TWO, "acme"), (ONE, "evil")):
        with pytest.raises(TokenInvalid):
            await world.user(key, iss=tenant)
    assert world.provider.requests == ["/acme/keys", "/globex/keys"]


@on_loop
async def test_a_thousand_tokens_at_once_are_one_fetch(provide: Any) -> None:
    world = World(provide)
    world.sets["/keys"] = published(one=ONE)
    token = jwt.encode({"sub": "42"}, ONE, "RS256", {"kid": "one"})
    verified = [start_future(world.verifier.connection(token)) for _ in range(1000)]
    assert [(await each).user for each in verified] == ["42"] * 1000
    assert world.provider.requests == ["/keys"]


@on_loop
async def test_a_worker_verifies_by_two_tables(provide: Any) -> None:
    provider = provide(lambda path, _: answer(published(one=ONE if path == "/one" else TWO)))
    settings = ClientSettings(
        token=TokenSettings(jwks_public_endpoint=provider.at("/one"), jwks_allow_insecure=True),
        subscription_token=SubscriptionTokenSettings(
            enabled=True, jwks_public_endpoint=provider.at("/two"), jwks_allow_insecure=True
        ),
    )
    metrics, clock = Metrics(), partial(float, NOW)
    one, two = (jwt.encode({"channel": "news"}, key, "RS256", {"kid": "one"}) for key in (ONE, TWO))
    both = make_verifier(settings, reactor, metrics, clock)
    assert (await both.subscription(two)).channel == "news"
    with pytest.raises(TokenInvalid):
        await both.subscription(one)
    alone = make_verifier(
        ClientSettings(token=settings.token, subscription_token=SubscriptionTokenSettings()), reactor, metrics, clock
    )
    assert (await alone.subscription(one)).channel == "news"
    with pytest.raises(TokenInvalid):
        await alone.subscription(two)
    assert provider.requests == ["/two", "/one"]
    # The permission of one table does not extend to the other.
    strict = ClientSettings(
        token=settings.token,
        subscription_token=SubscriptionTokenSettings(enabled=True, jwks_public_endpoint=provider.at("/two")),
    )
    with pytest.raises(KeysUnavailable):
        await make_verifier(strict, reactor, metrics, clock).subscription(two)
    assert provider.requests == ["/two", "/one"]
