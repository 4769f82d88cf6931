"""Tokens: good, expired, or invalid, and nothing in between."""

from __future__ import annotations

import base64
import json

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.protocol.tokens import TokenExpired, TokenInvalid, TokenVerifier
from realtime.settings import Token

KEY = "a secret of thirty-two characters"
OLD = "the one before, of enough characters"
NOW = 1_700_000_000.0


def verifier(**settings) -> TokenVerifier:
    return TokenVerifier(Token(**{"hmac_secret_key": KEY, **settings}), lambda: NOW)


def token(key: str = KEY, algorithm: str = "HS256", **claims) -> str:
    return jwt.encode(claims, key, algorithm=algorithm)


def unsigned(header: dict, claims: dict) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims)]
    return ".".join([*parts, ""])


def test_the_published_vectors():
    short = verifier(hmac_secret_key="secret")
    head = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"
    assert short.connection(f"{head}.eyJzdWIiOiI0MiJ9.79CVgMIG_JB921dVUeJDWNJubJojFodH3-XtC_1C408").user == "42"
    claims = short.subscription(
        f"{head}.eyJzdWIiOiI0MiIsImNoYW5uZWwiOiJuZXdzIn0.oxUUBcXxLORo9RiMfWQ4yGrbeHoHRfPk-5rM-TARuEY"
    )
    assert (claims.user, claims.channel) == ("42", "news")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_claims(algorithm):
    claims = verifier().connection(token(algorithm=algorithm, sub="42", info={"a": 1}, exp=NOW + 5))
    assert (claims.user, claims.info, claims.expire_at) == ("42", b'{"a":1}', NOW + 5)


def test_b64info_wins_and_expire_at_takes_the_place_of_exp():
    info = base64.b64encode(b'"x"').decode()
    claims = verifier().connection(token(sub="42", info=1, b64info=info, exp=NOW + 5, expire_at=0))
    assert (claims.info, claims.expire_at) == (b'"x"', 0.0)


def test_b64info_has_no_line_ends():
    info = base64.b64encode(b'{\n"a": 1}').decode()
    assert verifier().connection(token(sub="42", b64info=info)).info == b'{"a": 1}'


def test_a_token_without_a_user_is_anonymous():
    assert verifier().connection(token(exp=NOW + 1)).user == ""


def test_the_previous_key_until_its_end():
    old = token(OLD, sub="42")
    assert verifier(hmac_previous_secret_key=OLD).connection(old).user == "42"
    rotating = {"hmac_previous_secret_key": OLD, "hmac_previous_secret_key_valid_until": int(NOW) + 1}
    assert verifier(**rotating).connection(old).user == "42"
    with pytest.raises(TokenInvalid):
        verifier(**{**rotating, "hmac_previous_secret_key_valid_until": int(NOW)}).connection(old)


def test_audience_and_issuer():
    strict = verifier(audience="chat", issuer="login")
    assert strict.connection(token(sub="42", aud=["chat", "x"], iss="login")).user == "42"
    for claims in ({"aud": "chat"}, {"iss": "login"}, {"aud": "x", "iss": "login"}, {"aud": "chat", "iss": "x"}):
        with pytest.raises(TokenInvalid):
            strict.connection(token(sub="42", **claims))
    assert verifier().connection(token(sub="42", aud="whoever", iss="whoever")).user == "42"


@pytest.mark.parametrize("claims", [{"exp": NOW}, {"exp": 1}, {"nbf": NOW + 1}, {"exp": NOW - 0.5}])
def test_expired(claims):
    with pytest.raises(TokenExpired):
        verifier().connection(token(sub="42", **claims))


@pytest.mark.parametrize(
    "bad",
    [
        "",
        ".",
        "..",
        "a.b",
        "." * 4000,
        token("another secret of enough characters", sub="42"),
        token(sub="42")[:-2],
        token(sub="42") + "x.y",
        unsigned({"alg": "none"}, {"sub": "42"}),
        unsigned({"alg": "nOnE"}, {"sub": "42"}),
        unsigned({"alg": "HS256"}, {"sub": "42"}),
        unsigned({"alg": 5}, {"sub": "42"}),
        unsigned({}, {"sub": "42"}),
        token(sub=42),
        token(sub=["42"]),
        token(sub="42", exp="soon"),
        token(sub="42", exp=-1),
        token(sub="42", exp=1e300),
        token(sub="42", exp=True),
        token(sub="42", nbf="x"),
        token(sub="\ud800"),
        token(sub="42", info="\ud800"),
        token(sub="42", b64info="not base64!"),
        token(sub="42", b64info=base64.b64encode(b"no json").decode()),
        token(sub="42", b64info=base64.b64encode(b'"\xff"').decode()),
        token(sub="42", b64info=base64.b64encode(b"[" * 200 + b"]" * 200).decode()),
        token(sub="42", channel="news"),
        "x" * 8193,
    ],
)
def test_invalid(bad):
    with pytest.raises(TokenInvalid):
        verifier().connection(bad)


def test_a_wrong_claim_of_an_expired_token_is_invalid_not_expired():
    with pytest.raises(TokenInvalid):
        verifier().connection(token(sub=42, exp=1))


def test_without_a_key_nothing_is_good():
    with pytest.raises(TokenInvalid):
        verifier(hmac_secret_key="").connection(token(sub="42"))


def test_a_subscription_token_names_its_channel():
    with pytest.raises(TokenInvalid):
        verifier().subscription(token(sub="42"))


@given(st.text(max_size=100) | st.binary(max_size=100).map(lambda b: b.decode("latin-1")))
def test_any_text_is_refused_in_one_way(text):
    with pytest.raises(TokenInvalid):
        verifier().connection(text)
