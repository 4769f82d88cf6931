"""Checks of single values: addresses, origins, keys of tokens, references and regular expressions."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from realtime.config.checks import are_hosts, listed_groups
from tests.config.parsing import option_problem, parse_options, problem

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | dsa.DSAPrivateKey | ed25519.Ed25519PrivateKey

RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())

REFUSED = [
    ("[log]\nlevel = 'loud'", 2, 'one of "debug", "error", "info", "none", "trace", "warn", got "loud"'),
    (
        "[log]\nloggers = { chat = 'loud' }",
        2,
        "log.loggers: expected a table of loggers with a level (none, trace, debug",
    ),
    ("[engine]\ntype = 'nats'", 2, 'engine.type: expected one of "memory", "redis", got "nats"'),
    ("[http_server]\naddress = 'example.com'", 2, "expected an IP address"),
    ("[http_server]\ninternal_address = '0.0.0.0'", 2, "expected a loopback address"),
    ("[http_server]\ninternal_address = ''", 2, "expected a loopback address"),
    ("[client]\nallowed_origins = ['https://example.com/']", 2, 'got ["https://example.com/"]'),
    ("[client]\nallowed_origins = ['https://Example.com']", 2, "in lower case"),
    ("[client]\nallowed_origins = ['example.com']", 2, "origin patterns"),
    ("[client]\nallowed_origins = ['null']", 2, "origin patterns"),
    ("[http_api]\nhandler_prefix = 'api'", 2, 'expected a path that starts with "/", got "api"'),
    ("[websocket]\nhandler_prefix = '/a b'", 2, 'expected a path that starts with "/"'),
    ("[app]\nmodule = 'chat'", 2, 'expected the place of an App, such as "chat:app", got "chat"'),
    ("[app]\nmodule = 'chat.py:app:x'", 2, "app.module"),
    ("[app]\nmodule = 'chat:make.app'", 2, "app.module"),
    ("[channel.without_namespace]\nchannel_regex = '('", 2, "expected a regular expression that Python compiles"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_a_value_that_fails_its_check_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    found = problem(text)
    assert found.startswith(f"realtime.toml:{line}: ")
    assert message in found


def public(key: PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def private(key: PrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.mark.parametrize("table", ["client.token", "client.subscription_token"])
def test_public_keys_in_pem(table: str) -> None:
    client = parse_options(table, rsa_public_key=public(RSA), ecdsa_public_key=public(EC)).client
    token = client.token if table == "client.token" else client.subscription_token
    assert token.rsa_public_key == public(RSA)


NO_RSA_KEY = {
    "text": "hush-hush",
    "a path": "/etc/realtime/key.pem",
    "nothing inside": "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n",
    "cut": public(RSA)[:200],
    "a private key": private(RSA),
    "an elliptic key": public(EC),
    "a DSA key": public(dsa.generate_private_key(1024)),
    "a short key": public(rsa.generate_private_key(65537, 1024)),
}
NO_ELLIPTIC_KEY = {
    "text": "hush-hush",
    "a private key": private(EC),
    "an RSA key": public(RSA),
    "an Edwards key": public(ed25519.Ed25519PrivateKey.generate()),
    "another curve": public(ec.generate_private_key(ec.SECP256K1())),
}


@pytest.mark.parametrize("table", ["client.token", "client.subscription_token"])
@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(pytest.param("rsa_public_key", text, id=f"RSA: {name}") for name, text in NO_RSA_KEY.items()),
        *(pytest.param("ecdsa_public_key", text, id=f"EC: {name}") for name, text in NO_ELLIPTIC_KEY.items()),
    ],
)
def test_a_key_of_another_kind_is_refused_and_not_shown(table: str, key: str, text: str) -> None:
    line = option_problem(table, **{key: text})
    assert line.startswith(f"command line: {table}.{key}: expected the PEM text of a")
    assert "BEGIN PUBLIC KEY" in line
    assert text[30:60] not in line or not text[30:60]
    assert "hush" not in line


@pytest.mark.parametrize(
    "url",
    [
        "id.example/keys",
        "ftp://id.example/keys",
        "https://",
        "https:///keys",
        "https://id.example",
        "https://id.example:port/keys",
        "https://id.example:99999/keys",
        "https://[::1/keys",
        "https://id.example/my keys",
        "https://\u00fc.example/keys",
        "https://me:hush@id.example/keys",
    ],
)
def test_an_invalid_url_of_a_key_set_is_refused_and_not_shown(url: str) -> None:
    line = option_problem("client.token", jwks_public_endpoint=url)
    assert "expected an https address" in line
    assert "hush" not in line


@pytest.mark.parametrize(
    ("pattern", "listed"),
    [
        ("", {}),
        ("^https://(?P<tenant>acme|globex)$", {"tenant": ("acme", "globex")}),
        (r"(?P<host>a\.example|b)/(?P<realm>x-1)", {"host": ("a.example", "b"), "realm": ("x-1",)}),
        ("(?P<tenant>a.c)", {}),
        ("(?P<tenant>[a-z]+)", {}),
        ("(?P<tenant>acme|)", {}),
        ("(?P<tenant>acme|.*)", {}),
        (r"(?P<tenant>acme|\w)", {}),
        ("(acme|globex)", {}),
    ],
)
def test_groups_that_list_their_texts(pattern: str, listed: dict[str, tuple[str, ...]]) -> None:
    assert listed_groups(pattern) == listed


@pytest.mark.parametrize("host", ["keys", "keys.auth.svc", "10.0.0.5", "fd00::5", "key_server", "localhost"])
def test_hosts(host: str) -> None:
    assert are_hosts((host, "other"))


@pytest.mark.parametrize(
    "host", ["", "Keys.svc", "keys:8080", "http://keys", "keys/", "*.svc", "[fd00::5]", "fd00::x", "-a", ":"]
)
def test_texts_that_are_no_hosts(host: str) -> None:
    assert not are_hosts((host,))
    assert "expected a list of host names" in option_problem("client.token", jwks_allowed_hosts=host or " ")
