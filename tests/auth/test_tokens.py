"""Tokens: good, expired, or invalid, and nothing in between."""

from __future__ import annotations

import base64
import json
from collections.abc import Coroutine
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from realtime.auth.keys import VerificationKey, key_set
from realtime.auth.tokens import Claims, SubOptions, TokenExpired, TokenInvalid, TokenVerifier
from realtime.config.settings import SubscriptionTokenSettings, TokenSettings
from realtime.errors import KeysUnavailable
from realtime.metrics import Metrics
from realtime.types import ConnectRequest

KEY = "a secret of thirty-two characters"
OLD = "the one before, of enough characters"
NOW = 1_700_000_000.0

RSA = rsa.generate_private_key(65537, 2048)
EC = {
    name: ec.generate_private_key(curve)
    for name, curve in (("ES256", ec.SECP256R1()), ("ES384", ec.SECP384R1()), ("ES512", ec.SECP521R1()))
}


def pem(private: Any) -> str:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits."""
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    return ended.value.value


class Verifier:
    """A verifier whose keys are at hand."""

    def __init__(self, settings: dict[str, Any], **arguments: Any) -> None:
        self.of = TokenVerifier(TokenSettings(**settings), lambda: NOW, **arguments)

    def connection(self, token: str) -> Claims:
        return finish(self.of.connection(token))

    def subscription(self, token: str) -> Claims:
        return finish(self.of.subscription(token))


def verifier(**settings: Any) -> Verifier:
    return Verifier({"hmac_secret_key": KEY, **settings})


def token(key: Any = KEY, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **claims: Any) -> str:
    return jwt.encode(claims, key, algorithm=algorithm, headers=headers)


def encoded(part: Any) -> str:
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def unsigned(header: Any, claims: Any) -> str:
    return f"{encoded(header)}.{encoded(claims)}."


def signed(header: Any, claims: Any, key: str = KEY) -> str:
    """A token with a good signature and any header and body, which no library would make."""
    text = f"{encoded(header)}.{encoded(claims)}"
    return f"{text}.{encoded(jwt.get_algorithm_by_name('HS256').sign(text.encode(), key.encode()))}"


HS256 = {"alg": "HS256", "typ": "JWT"}
ALICE = {"sub": "42"}


# Good ones.


def test_the_published_vectors():
    short = verifier(hmac_secret_key="secret")
    head = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"
    assert short.connection(f"{head}.eyJzdWIiOiI0MiJ9.79CVgMIG_JB921dVUeJDWNJubJojFodH3-XtC_1C408").user == "42"
    claims = short.subscription(
        f"{head}.eyJzdWIiOiI0MiIsImNoYW5uZWwiOiJuZXdzIn0.oxUUBcXxLORo9RiMfWQ4yGrbeHoHRfPk-5rM-TARuEY"
    )
    assert (claims.user, claims.channel) == ("42", "news")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_shared_secret(algorithm):
    claims = verifier().connection(token(algorithm=algorithm, sub="42", info={"a": 1}, exp=NOW + 5))
    assert (claims.user, claims.expire_at) == ("42", NOW + 5)
    assert json.loads(claims.info) == {"a": 1}


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512"])
def test_an_rsa_key(algorithm):
    keyed = verifier(hmac_secret_key="", rsa_public_key=pem(RSA))
    assert keyed.connection(token(RSA, algorithm, sub="42")).user == "42"


@pytest.mark.parametrize("algorithm", EC)
def test_a_key_on_an_elliptic_curve_signs_by_the_algorithm_of_its_curve_alone(algorithm):
    keyed = verifier(hmac_secret_key="", ecdsa_public_key=pem(EC[algorithm]))
    good = token(EC[algorithm], algorithm, sub="42")
    assert keyed.connection(good).user == "42"
    for other in EC.keys() - {algorithm}:
        with pytest.raises(TokenInvalid):
            keyed.connection(token(EC[other], other, sub="42"))
        with pytest.raises(TokenInvalid):
            keyed.connection(f"{encoded({'alg': other})}.{good.partition('.')[2]}")


def test_keys_of_every_family_at_once():
    keyed = verifier(rsa_public_key=pem(RSA), ecdsa_public_key=pem(EC["ES256"]))
    for key, algorithm in ((KEY, "HS256"), (RSA, "RS256"), (EC["ES256"], "ES256")):
        assert keyed.connection(token(key, algorithm, sub="42")).user == "42"


def test_b64info_wins_and_expire_at_takes_the_place_of_exp():
    claims = verifier().connection(token(sub="42", info=1, b64info=b64(b'"x"'), exp=NOW + 5, expire_at=0))
    assert (claims.info, claims.expire_at) == (b'"x"', 0.0)


def test_info_is_passed_on_as_it_was_written_but_on_one_line():
    text = b'{"sub": "42", "info": {"b": 1.50,\n "a": "\\u00fc"}}'
    assert verifier().connection(signed(HS256, text)).info == b'{"b": 1.50, "a": "\\u00fc"}'
    assert verifier().connection(token(sub="42", b64info=b64(b'{\n"a": 1}'))).info == b'{"a": 1}'


def test_a_token_without_a_user_is_anonymous():
    assert verifier().connection(token(exp=NOW + 1)).user == ""


def test_the_user_may_be_in_another_claim():
    other = verifier(user_id_claim="user_id")
    assert other.connection(token(user_id="42", sub=7)).user == "42"
    assert other.connection(token(sub="42")).user == ""
    for number, user in ((42, "42"), (0, "0"), (-7, "-7"), (2**64, "18446744073709551616")):
        assert other.connection(token(user_id=number)).user == user
        assert other.subscription(token(user_id=number, channel="news")).user == user
    for wrong in (1.5, 42.0, True, [42], {"id": 42}, 10**20):
        with pytest.raises(TokenInvalid):
            other.connection(token(user_id=wrong))
    assert other.connection(token(user_id=None, sub="7")).user == ""


def test_what_is_absent_and_what_is_null():
    names = ("sub", "exp", "nbf", "expire_at", "info", "b64info", "subs", "channels", "meta", "channel")
    head = {**HS256, "kid": None, "typ": None}
    assert verifier().connection(signed(head, dict.fromkeys(names))) == Claims("")
    names = ("sub", "exp", "nbf", "expire_at", "info", "b64info", "data", "b64data", "client", "override")
    nulls = dict.fromkeys(names) | {"channel": "news"}
    assert verifier().subscription(signed(HS256, nulls)) == Claims("", channel="news")
    assert verifier().connection(token(sub="42", channel="")) == Claims("42")
    assert verifier().connection(token(sub="42", channels=["news", None])) == Claims("42", channels=("news",))
    options = {"info": None, "b64info": None, "data": None, "b64data": None, "override": None}
    for entry in (None, {}, options):
        claims = verifier().connection(token(sub="42", subs={"news": entry}))
        assert claims == Claims("42", subs={"news": SubOptions()})
    for value in ({}, {"value": None}, {"value": False}):
        override = {"presence": value, "join_leave": None}
        claims = verifier().connection(token(sub="42", subs={"news": {"override": override}}))
        assert claims.subs["news"].override == {"presence": False}
        claims = verifier().subscription(token(sub="42", channel="news", override=override))
        assert claims.override == {"presence": False}


def test_each_kind_of_token_has_its_own_claims():
    for_subscriptions = {"client": 5, "data": {"a": 1}, "b64data": "!", "override": []}
    assert verifier().connection(token(sub="42", **for_subscriptions)) == Claims("42")
    for_connections = {"meta": "x", "channels": "a", "subs": []}
    claims = verifier().subscription(token(sub="42", channel="news", **for_connections))
    assert claims == Claims("42", channel="news")


def test_base64_has_line_ends_or_none():
    text = json.dumps("x" * 100).encode()
    for spelled in (
        b64(text),
        base64.encodebytes(text).decode(),
        base64.encodebytes(text).decode().replace("\n", "\r\n"),
    ):
        assert verifier().connection(token(sub="42", b64info=spelled)).info == text
        assert verifier().connection(token(subs={"a": {"b64data": spelled}})).subs["a"].data == text
        claims = verifier().subscription(token(channel="a", b64info=spelled, b64data=spelled))
        assert claims.info == claims.data == text


@pytest.mark.parametrize("content", [b"\xff", b'"\xff"', b"no json", b"\0", b"[" * 200 + b"]" * 200])
def test_base64_of_bytes_that_are_not_json(content):
    marked = b"\0" + content
    claims = verifier().subscription(token(channel="a", b64info=b64(content), b64data=b64(content)))
    assert claims.info == claims.data == marked
    assert verifier().connection(token(b64info=b64(content))).info == marked
    claims = verifier().connection(token(subs={"a": {"b64info": b64(content), "b64data": b64(content)}}))
    assert claims.subs == {"a": SubOptions(marked, marked)}


def test_times_in_quotes():
    claims = verifier().connection(token(sub="42", exp=str(int(NOW) + 5), nbf=str(int(NOW))))
    assert claims.expire_at == NOW + 5
    with pytest.raises(TokenExpired):
        verifier().connection(token(sub="42", exp="1"))
    for wrong in ("", "soon", "1e", "0x10", " 5", "1800000000s", "-1", "1e300"):
        with pytest.raises(TokenInvalid):
            verifier().connection(token(sub="42", exp=wrong))
    with pytest.raises(TokenInvalid):
        verifier().connection(token(sub="42", expire_at="1800000000"))


@pytest.mark.parametrize("meta", [5, "free", [], {"plan": "free"}, False])
def test_meta_is_any_json(meta):
    assert json.loads(verifier().connection(token(sub="42", meta=meta)).meta) == meta


def test_server_side_subscriptions():
    claims = verifier().connection(token(sub="42", channels=["news", "chat:1"], meta={"plan": "free"}))
    assert claims == Claims("42", channels=("news", "chat:1"), meta=b'{"plan":"free"}')


def test_subs_have_options_and_take_the_place_of_channels():
    wanted = {
        "news": {},
        "chat:1": {
            "info": {"role": "owner"},
            "b64data": b64(b"[1]"),
            "override": {"presence": {"value": True}, "force_recovery": {"value": False}, "join_leave": None, "x": 1},
        },
    }
    claims = verifier().connection(token(sub="42", channels=["other"], subs=wanted))
    assert claims.channels == ()
    assert claims.subs == {
        "news": SubOptions(),
        "chat:1": SubOptions(b'{"role":"owner"}', b"[1]", {"presence": True, "force_recovery": False}),
    }
    assert verifier().connection(token(sub="42", channels=["other"], subs={})).channels == ("other",)


def test_a_subscription_token():
    claims = verifier().subscription(
        token(
            sub="42",
            channel="$chat",
            client="c1",
            data={"a": 1},
            info=1,
            override={"force_push_join_leave": {"value": True}, "force_positioning": {"value": False}},
        )
    )
    assert claims == Claims(
        "42",
        b"1",
        b'{"a":1}',
        channel="$chat",
        client="c1",
        override={"force_push_join_leave": True, "force_positioning": False},
    )


def test_the_previous_key_until_its_end():
    old = token(OLD, sub="42")
    assert verifier(hmac_previous_secret_key=OLD).connection(old).user == "42"
    rotating = {"hmac_previous_secret_key": OLD, "hmac_previous_secret_key_valid_until": int(NOW) + 1}
    assert verifier(**rotating).connection(old).user == "42"
    ended = verifier(**{**rotating, "hmac_previous_secret_key_valid_until": int(NOW)})
    assert ended.connection(token(sub="42")).user == "42"
    with pytest.raises(TokenInvalid):
        ended.connection(old)


def test_audience_and_issuer():
    strict = verifier(audience="chat", issuer="login")
    assert strict.connection(token(sub="42", aud=["chat", "x"], iss="login")).user == "42"
    assert strict.connection(token(sub="42", aud="chat", iss="login")).user == "42"
    for claims in (
        {"aud": "chat"},
        {"iss": "login"},
        {"aud": "x", "iss": "login"},
        {"aud": "chat", "iss": "x"},
        {"aud": "chat", "iss": ["login"]},
        {"aud": {"chat": 1}, "iss": "login"},
    ):
        with pytest.raises(TokenInvalid):
            strict.connection(signed(HS256, {"sub": "42", **claims}))
    assert verifier().connection(token(sub="42", aud="whoever", iss="whoever")).user == "42"


def test_audience_and_issuer_by_pattern():
    loose = verifier(audience_regex="^chat-", issuer_regex=r"^https://[a-z]+\.example$")
    assert loose.connection(token(sub="42", aud=["x", "chat-1"], iss="https://login.example")).user == "42"
    for claims in ({}, {"aud": "chat-1"}, {"aud": "x", "iss": "https://login.example"}, {"aud": "chat-1", "iss": "x"}):
        with pytest.raises(TokenInvalid):
            loose.connection(token(sub="42", **claims))
    with pytest.raises(TokenInvalid):
        verifier(issuer_regex=".*").connection(token(sub="42"))


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+jwt", "application/at+jwt", None])
def test_types_of_tokens(typ):
    header = {"alg": "HS256"} | ({"typ": typ} if typ else {})
    assert verifier().connection(signed(header, ALICE)).user == "42"


def test_addresses_and_keys_in_a_header_are_of_no_interest():
    foreign = {"jku": "http://127.0.0.1/", "x5u": "http://127.0.0.1/", "jwk": {"kty": "oct"}, "x5c": [], "kid": "../x"}
    assert verifier().connection(signed(HS256 | foreign, ALICE)).user == "42"


# Expired ones.


@pytest.mark.parametrize("claims", [{"exp": NOW}, {"exp": 1}, {"exp": 0}, {"nbf": NOW + 6}, {"exp": NOW - 0.5}])
def test_expired(claims):
    with pytest.raises(TokenExpired):
        verifier().connection(token(sub="42", **claims))


@pytest.mark.parametrize("leeway", [0.0, 2.0, 5.0])
def test_the_leeway_is_for_nbf_alone(leeway):
    now = NOW - leeway
    judge = TokenVerifier(TokenSettings(hmac_secret_key=KEY, leeway=leeway), lambda: now)
    lasting = token(sub="42", nbf=NOW, exp=NOW + 10)
    assert finish(judge.connection(lasting)).expire_at == NOW + 10
    now = NOW + 9.999
    assert finish(judge.connection(lasting)).user == "42"
    for now in (NOW - leeway - 0.001, NOW + 10):  # noqa: B007
        with pytest.raises(TokenExpired):
            finish(judge.connection(lasting))


def test_the_clock_of_an_issuer_may_be_seconds_ahead():
    assert verifier().connection(token(sub="42", nbf=NOW + 2, iat=NOW + 2)).user == "42"
    assert verifier().subscription(token(sub="42", channel="news", nbf=NOW + 2)).user == "42"


def test_a_token_outlives_what_it_admits_and_the_other_way_round():
    assert verifier().connection(token(sub="42", exp=NOW + 5, expire_at=NOW - 5)).expire_at == NOW - 5
    with pytest.raises(TokenExpired):
        verifier().connection(token(sub="42", exp=NOW - 5, expire_at=NOW + 5))


@pytest.mark.parametrize("wrong", [{"sub": 42}, {"channel": "news"}, {"info": "\ud800"}, {"subs": {"": {}}}])
def test_a_wrong_claim_of_an_expired_token_is_invalid_not_expired(wrong):
    with pytest.raises(TokenInvalid):
        verifier().connection(token(**{"sub": "42", "exp": 1} | wrong))


# Bad ones.

GOOD = token(sub="42")
HEAD, BODY, SIGNATURE = GOOD.split(".")
OTHER = token(sub="43")
STRANGER = rsa.generate_private_key(65537, 2048)
PUBLIC = pem(RSA)

HOSTILE = {
    # Not a token at all.
    "empty": "",
    "a dot": ".",
    "two dots": "..",
    "two parts": "a.b",
    "no signature": f"{HEAD}.{BODY}.",
    "no signature and no dot": f"{HEAD}.{BODY}",
    "four parts": f"{GOOD}.{SIGNATURE}",
    "five parts, as a JWE": f"{HEAD}.{BODY}.{SIGNATURE}.{BODY}.{SIGNATURE}",
    "many dots": "." * 8000,
    "a million dots": "." * 1_000_000,
    "too long": "x" * 8193,
    "a line end after it": GOOD + "\n",
    "a space before it": " " + GOOD,
    "padding": f"{HEAD}.{BODY}.{SIGNATURE}=",
    "base64 that is not for URLs": f"{HEAD}.{BODY}.+/{SIGNATURE[2:]}",
    "no ASCII": f"{HEAD}.{BODY}.é{SIGNATURE[1:]}",
    "no Unicode": f"{HEAD}.{BODY}.\ud800",
    "NUL": GOOD + "\0",
    "not base64 by its length": f"{HEAD}.{BODY}.{SIGNATURE}AA",
    # Signatures.
    "a cut signature": GOOD[:-2],
    "a signature of one byte": f"{HEAD}.{BODY}.AA",
    "the signature of another token": f"{HEAD}.{BODY}.{OTHER.split('.')[2]}",
    "the body of another token": f"{HEAD}.{OTHER.split('.')[1]}.{SIGNATURE}",
    "another spelling of the signature": GOOD[:-1] + chr(ord(GOOD[-1]) + 1),
    "another secret": token("another secret of enough characters", sub="42"),
    # Algorithms.
    "none": unsigned({"alg": "none"}, ALICE),
    "none, with a signature": f"{encoded({'alg': 'none'})}.{BODY}.{SIGNATURE}",
    "None": signed({"alg": "None"}, ALICE),
    "nOnE": signed({"alg": "nOnE"}, ALICE),
    "no algorithm": signed({"typ": "JWT"}, ALICE),
    "an empty algorithm": signed({"alg": ""}, ALICE),
    "null": signed({"alg": None}, ALICE),
    "a number": signed({"alg": 256}, ALICE),
    "a list": signed({"alg": ["HS256"]}, ALICE),
    "lower case": signed({"alg": "hs256"}, ALICE),
    "one that nobody knows": signed({"alg": "HS257"}, ALICE),
    "another one of its family": signed({"alg": "HS512"}, ALICE),
    "one of another family": signed({"alg": "RS256"}, ALICE),
    "one that is not for this key": token(RSA, "PS256", sub="42"),
    "an RSA key of the client's own": token(STRANGER, "RS256", sub="42"),
    "the public key as the secret": signed(HS256, ALICE, PUBLIC),
    "the public key as the secret, without its end": signed(HS256, ALICE, PUBLIC.strip()),
    "a key of the client's own in the header": token(
        STRANGER,
        "RS256",
        {"jwk": json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(STRANGER.public_key()))},
        sub="42",
    ),
    # Headers.
    "crit": signed(HS256 | {"crit": ["exp"]}, ALICE),
    "crit with unknown names": signed(HS256 | {"crit": ["x"], "x": 1}, ALICE),
    "empty crit": signed(HS256 | {"crit": []}, ALICE),
    "b64 false": signed(HS256 | {"b64": False, "crit": ["b64"]}, ALICE),
    "b64 without crit": signed(HS256 | {"b64": False}, ALICE),
    "zip": signed(HS256 | {"zip": "DEF"}, ALICE),
    "nested": signed(HS256 | {"cty": "JWT"}, ALICE),
    "encrypted": signed({"alg": "HS256", "enc": "A128GCM"}, ALICE),
    "of another type": signed(HS256 | {"typ": "logout+jwt"}, ALICE),
    "of a type that is none": signed(HS256 | {"typ": 5}, ALICE),
    "a kid that is too long": signed(HS256 | {"kid": "k" * 256}, ALICE),
    "a kid that is a number": signed(HS256 | {"kid": 5}, ALICE),
    "a header that is a list": signed([HS256], ALICE),
    "a header that is no JSON": signed(b"HS256", ALICE),
    "a header that is not UTF-8": signed(b'{"alg":"HS256","kid":"\xff"}', ALICE),
    "a header of many brackets": signed(b"[" * 2000, ALICE),
    "a header with text after it": signed(b'{"alg":"HS256"} x', ALICE),
    # Bodies.
    "a body that is a list": signed(HS256, [ALICE]),
    "a body that is a text": signed(HS256, "42"),
    "a body that is no JSON": signed(HS256, b"sub=42"),
    "a body that is not UTF-8": signed(HS256, b'{"sub":"42","info":"\xff"}'),
    "a body of many brackets": signed(HS256, b'{"a":' * 1000),
    "a body with NaN": signed(HS256, b'{"sub":"42","exp":NaN}'),
    # Claims.
    "sub as a number": signed(HS256, {"sub": 42}),
    "sub as a list": signed(HS256, {"sub": ["42"]}),
    "sub with half a character": signed(HS256, {"sub": "\ud800"}),
    "sub with half a character inside": signed(HS256, {"sub": "a\ud800b"}),
    "exp as a truth": signed(HS256, {"sub": "42", "exp": True}),
    "negative exp": signed(HS256, {"sub": "42", "exp": -1}),
    "exp beyond all bounds": signed(HS256, {"sub": "42", "exp": 1e300}),
    "exp beyond what numbers can be": signed(HS256, b'{"sub":"42","exp":1e999}'),
    "exp of a thousand digits": signed(HS256, b'{"sub":"42","exp":' + b"9" * 1000 + b"}"),
    "exp a second too large": signed(HS256, {"sub": "42", "exp": 2**53 + 2}),
    "nbf as text": signed(HS256, {"sub": "42", "nbf": "x"}),
    "negative expire_at": signed(HS256, {"sub": "42", "expire_at": -5}),
    "expire_at as text": signed(HS256, {"sub": "42", "expire_at": ""}),
    "info with half a character": signed(HS256, {"sub": "42", "info": "\ud800"}),
    "info that is too deep": signed(HS256, {"sub": "42", "info": json.loads("[" * 200 + "]" * 200)}),
    "b64info that is not base64": signed(HS256, {"sub": "42", "b64info": "not base64!"}),
    "b64info with more than base64": signed(HS256, {"sub": "42", "b64info": "M!Q=="}),
    "b64info with spaces": signed(HS256, {"sub": "42", "b64info": "M Q=="}),
    "b64info as a number": signed(HS256, {"sub": "42", "b64info": 5}),
    "a channel": signed(HS256, {"sub": "42", "channel": "news"}),
    "a channel that is a number": signed(HS256, {"sub": "42", "channel": 5}),
    "channels as text": signed(HS256, {"sub": "42", "channels": "news"}),
    "channels as numbers": signed(HS256, {"sub": "42", "channels": [1]}),
    "channels with half a character": signed(HS256, {"sub": "42", "channels": ["a\ud800b"]}),
    "subs as a list": signed(HS256, {"sub": "42", "subs": ["news"]}),
    "channels with an empty one": signed(HS256, {"sub": "42", "channels": ["news", ""]}),
    "subs with an empty one": signed(HS256, {"sub": "42", "subs": {"": {}}}),
    "subs of numbers": signed(HS256, {"sub": "42", "subs": {"news": 1}}),
    "subs with wrong info": signed(HS256, {"sub": "42", "subs": {"news": {"b64info": "!"}}}),
    "subs with a wrong override": signed(HS256, {"sub": "42", "subs": {"news": {"override": {"presence": True}}}}),
    "subs with a wronger one": signed(HS256, {"sub": "42", "subs": {"news": {"override": {"presence": {"value": 1}}}}}),
    "subs with an override that is a list": signed(HS256, {"sub": "42", "subs": {"news": {"override": []}}}),
    "meta with half a character": signed(HS256, {"sub": "42", "meta": "\ud800"}),
}


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_invalid(bad):
    judge = verifier(hmac_previous_secret_key=OLD, rsa_public_key=PUBLIC, ecdsa_public_key=pem(EC["ES256"]))
    assert judge.connection(GOOD).user == "42"
    with pytest.raises(TokenInvalid) as caught:
        judge.connection(bad)
    assert KEY not in str(caught.value)


def test_a_token_of_any_length_when_there_is_no_limit():
    endless = verifier(max_length=0)
    long = token(sub="42", info="x" * 60_000)
    assert endless.connection(long).user == "42"
    for bad in (long[:-2], "." * 1_000_000, "a" * 1_000_000, ("a" * 500_000) + "." + ("a" * 500_000)):
        with pytest.raises(TokenInvalid):
            endless.connection(bad)
    with pytest.raises(TokenInvalid):
        verifier().connection(long)


def test_without_a_key_nothing_is_good():
    for bad in (token(sub="42"), signed(HS256, ALICE, ""), *HOSTILE.values()):
        with pytest.raises(TokenInvalid):
            verifier(hmac_secret_key="").connection(bad)


def test_a_subscription_token_names_its_channel():
    for claims in ({}, {"channel": ""}, {"channel": 5}, {"channel": ["news"]}, {"channel": None}):
        with pytest.raises(TokenInvalid):
            verifier().subscription(token(sub="42", **claims))


@given(st.text(max_size=100) | st.binary(max_size=100).map(lambda b: b.decode("latin-1")))
def test_any_text_is_refused_in_one_way(text):
    with pytest.raises(TokenInvalid):
        verifier().connection(text)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_NAMES = ["sub", "exp", "nbf", "expire_at", "info", "b64info", "data", "b64data", "channel", "channels", "subs", "meta"]
_NAMES += ["override", "client", "aud", "iss"]


@given(st.dictionaries(st.sampled_from(_NAMES), _json))
def test_any_claims_are_taken_or_refused_and_what_is_taken_can_be_passed_on(claims):
    judge = verifier()
    for judged in (judge.connection, judge.subscription):
        try:
            found = judged(signed(HS256, claims))
        except (TokenInvalid, TokenExpired):
            continue
        for text in (found.info, found.data, found.meta):
            assert not text or text.startswith(b"\0") or json.loads(text) is not None
        assert found.user == (claims.get("sub") or "")


# A second table, for subscription tokens.


def test_subscription_tokens_by_a_table_of_their_own_inherit_nothing():
    second = SubscriptionTokenSettings(enabled=True, hmac_secret_key=OLD)
    judge = Verifier({"hmac_secret_key": KEY, "audience": "chat"}, subscriptions=TokenVerifier(second, lambda: NOW))
    assert judge.connection(token(sub="42", aud="chat")).user == "42"
    assert judge.subscription(token(OLD, sub="42", channel="news")).channel == "news"
    with pytest.raises(TokenInvalid):
        judge.subscription(token(KEY, sub="42", channel="news", aud="chat"))
    with pytest.raises(TokenInvalid):
        judge.connection(token(OLD, sub="42", aud="chat"))


# Key sets.


class Published:
    """Key sets at hand, and the questions that were asked of them."""

    def __init__(self, sets: dict[str, dict[str, VerificationKey]]) -> None:
        self.sets = sets
        self.asked: list[tuple[str, str]] = []

    async def key(self, endpoint: str, kid: str) -> VerificationKey | None:
        self.asked.append((endpoint, kid))
        if endpoint not in self.sets:
            raise KeysUnavailable("away")
        return self.sets[endpoint].get(kid)


def set_of(**keys: Any) -> dict[str, VerificationKey]:
    entries = []
    for kid, private in keys.items():
        algorithm = jwt.get_algorithm_by_name("RS256" if isinstance(private, rsa.RSAPrivateKey) else "ES256")
        entries.append(algorithm.to_jwk(private.public_key(), as_dict=True) | {"kid": kid, "use": "sig"})
    return key_set(json.dumps({"keys": entries}).encode())


HERE = "https://id.example/jwks.json"


def test_a_key_set_takes_the_place_of_the_static_keys():
    published = Published({HERE: set_of(one=RSA, two=EC["ES256"])})
    judge = Verifier({"hmac_secret_key": KEY, "jwks_public_endpoint": HERE}, key_sets=published)
    assert judge.connection(token(RSA, "RS256", {"kid": "one"}, sub="42")).user == "42"
    assert judge.connection(token(EC["ES256"], "ES256", {"kid": "two"}, sub="42")).user == "42"
    asked = len(published.asked)
    for bad in (
        token(sub="42"),
        token(headers={"kid": "one"}, sub="42"),
        token(RSA, "RS256", sub="42"),
        signed({"alg": "none", "kid": "one"}, ALICE),
        signed({"alg": "HS256", "kid": "one"}, ALICE, PUBLIC),
    ):
        with pytest.raises(TokenInvalid):
            judge.connection(bad)
    assert len(published.asked) == asked  # nobody is asked for keys on account of these
    for bad in (
        token(RSA, "RS256", {"kid": "two"}, sub="42"),
        token(RSA, "PS256", {"kid": "one"}, sub="42"),
        token(RSA, "RS256", {"kid": "three"}, sub="42"),
        token(EC["ES256"], "ES256", {"kid": "../one"}, sub="42"),
        token(EC["ES256"], "ES256", {"kid": "https://evil.example/"}, sub="42"),
        token(EC["ES256"], "ES256", {"kid": "' OR 1=1"}, sub="42"),
    ):
        with pytest.raises(TokenInvalid):
            judge.connection(bad)


def test_a_key_that_can_not_be_had_is_no_fault_of_the_token():
    good = token(RSA, "RS256", {"kid": "one"}, sub="42")
    for sets in (Published({}), None):
        with pytest.raises(KeysUnavailable):
            Verifier({"jwks_public_endpoint": HERE}, key_sets=sets).connection(good)


def test_each_tenant_has_a_key_set_and_only_listed_ones_are_asked_for():
    other = rsa.generate_private_key(65537, 2048)
    published = Published(
        {"https://id.example/acme/keys": set_of(one=RSA), "https://id.example/glo.bex/keys": set_of(one=other)}
    )
    judge = Verifier(
        {
            "jwks_public_endpoint": "https://id.example/{{tenant}}/keys",
            "issuer_regex": r"^https://(?P<tenant>acme|glo\.bex|gone)(?P<rest>.*)$",
        },
        key_sets=published,
    )

    def of(tenant: str, key: Any, **claims: Any) -> str:
        return token(key, "RS256", {"kid": "one"}, sub="42", iss=f"https://{tenant}", **claims)

    assert judge.connection(of("acme", RSA)).user == "42"
    assert judge.connection(of("glo.bex", other)).user == "42"
    for tenant in ("acme", "glo.bex"):
        # The same key id: a tenant's tokens are judged by that tenant's keys.
        with pytest.raises(TokenInvalid):
            judge.connection(of(tenant, other if tenant == "acme" else RSA))
    with pytest.raises(KeysUnavailable):
        judge.connection(of("gone", RSA))
    asked = len(published.asked)
    for tenant in ("evil", "gloxbex", "ACME", "", "../acme", "x?https://acme", "a\ncme"):
        with pytest.raises(TokenInvalid):
            judge.connection(of(tenant, RSA))
    assert len(published.asked) == asked


def test_a_pattern_that_matches_more_than_it_lists_opens_no_further_address():
    published = Published({})
    judge = Verifier(
        {"jwks_public_endpoint": "https://id.example/{{tenant}}", "audience_regex": "(?i)^(?P<tenant>acme)$"},
        key_sets=published,
    )
    with pytest.raises(TokenInvalid):
        judge.connection(token(RSA, "RS256", {"kid": "one"}, sub="42", aud="ACME"))
    assert published.asked == []


def test_what_was_made_of_tokens_is_counted():
    metrics = Metrics()
    second = TokenVerifier(SubscriptionTokenSettings(jwks_public_endpoint=HERE), lambda: NOW, metrics=metrics)
    judge = Verifier({"hmac_secret_key": KEY}, subscriptions=second, metrics=metrics)
    judge.connection(GOOD)
    for bad in (GOOD[:-1], "x", token(sub="42", channel="news"), token(sub="42", exp=1)):
        with pytest.raises((TokenInvalid, TokenExpired)):
            judge.connection(bad)
    with pytest.raises(KeysUnavailable):
        judge.subscription(token(RSA, "RS256", {"kid": "one"}, sub="42", channel="news"))
    counts = {dict(sample.labels)["outcome"]: sample.value for sample in metrics.snapshot()}
    assert counts == {"good": 1, "expired": 1, "invalid": 3, "unjudged": 1}


def test_what_a_verifier_shows_of_itself_has_no_secrets():
    judge = verifier(hmac_previous_secret_key=OLD)
    shown = repr(judge.of) + repr(vars(judge.of))
    assert KEY not in shown
    assert OLD not in shown


def test_what_a_handler_may_print_of_a_client_that_connects_has_no_secrets():
    request = ConnectRequest(token=GOOD, headers={"cookie": "hush"}, query={"token": "hush"}, data={"password": "hush"})
    assert repr(request) == "<ConnectRequest of '' from ''>"
