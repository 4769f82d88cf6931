"""The settings of tokens: what is refused at the start, in one line each, and what is warned of."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from realtime.config.settings import Settings, listed_groups, parse
from realtime.errors import SettingsError

RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())


def public(key: Any) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def private(key: Any) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def given(table: str, **keys: str) -> Settings:
    return parse({f"client.{table}.{key}": text for key, text in keys.items()}, None, {})


def refusal(table: str, **keys: str) -> str:
    with pytest.raises(SettingsError) as caught:
        given(table, **keys)
    (line,) = caught.value.problems
    assert line.isprintable()
    return line


@pytest.mark.parametrize("table", ["token", "subscription_token"])
def test_public_keys_in_pem(table: str) -> None:
    settings = given(table, rsa_public_key=public(RSA), ecdsa_public_key=public(EC))
    assert getattr(settings.client, table).rsa_public_key == public(RSA)


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


@pytest.mark.parametrize("table", ["token", "subscription_token"])
@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(pytest.param("rsa_public_key", text, id=f"RSA: {name}") for name, text in NO_RSA_KEY.items()),
        *(pytest.param("ecdsa_public_key", text, id=f"EC: {name}") for name, text in NO_ELLIPTIC_KEY.items()),
    ],
)
def test_a_key_of_another_kind_is_refused_without_showing_it(table: str, key: str, text: str) -> None:
    line = refusal(table, **{key: text})
    assert line.startswith(f"command line: client.{table}.{key}: expected the PEM text of a")
    assert "BEGIN PUBLIC KEY" in line
    assert text[30:60] not in line or not text[30:60]
    assert "hush" not in line


@pytest.mark.parametrize("key", ["hmac_secret_key", "hmac_previous_secret_key"])
def test_a_public_key_is_no_secret(key: str) -> None:
    line = refusal("token", **{"hmac_secret_key": "x" * 32, key: public(RSA)})
    assert line.startswith(f"command line: client.token.{key}: is a PEM key")
    assert public(RSA)[30:60] not in line


@pytest.mark.parametrize(
    "address",
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
def test_an_address_that_is_none(address: str) -> None:
    line = refusal("token", jwks_public_endpoint=address)
    assert "expected an https address" in line
    assert "hush" not in line


def test_http_only_when_allowed() -> None:
    assert "use https" in refusal("token", jwks_public_endpoint="http://id.example/keys")
    given("token", jwks_public_endpoint="http://id.example/keys", jwks_allow_insecure="true")


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


@pytest.mark.parametrize("pattern", ["(?P<tenant>[a-z]+)", "(?P<other>acme)", "acme"])
def test_an_address_is_made_of_listed_texts_alone(pattern: str) -> None:
    line = refusal("token", jwks_public_endpoint="https://id.example/{{tenant}}/keys", issuer_regex=pattern)
    assert "{{name}} stands for a named group" in line


@pytest.mark.parametrize("address", ["https://id.example/{tenant}", "https://id.example/{{ tenant }}"])
def test_a_placeholder_that_is_none(address: str) -> None:
    refusal("token", jwks_public_endpoint=address, issuer_regex="(?P<tenant>acme)")


def test_an_address_of_listed_texts() -> None:
    given(
        "token",
        jwks_public_endpoint="https://{{host}}/{{tenant}}/keys",
        issuer_regex="(?P<tenant>acme|globex)",
        audience_regex=r"(?P<host>a\.example)",
    )
