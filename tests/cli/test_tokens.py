"""`realtime gen-token`, `check-token` and the same for subscription tokens, run as an operator runs them."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from realtime.cli import main
from realtime.cli.main import build_parser

ROOT = Path(__file__).parents[2]
SECRET = "a secret of thirty-two characters"
OTHER = "another one of enough characters"
EX_CONFIG = 78
KEY = rsa.generate_private_key(65537, 2048)

Realtime = Callable[..., tuple[int, str, str]]
"""Runs a command with its arguments, and with the text of a configuration file if given."""


@pytest.fixture
def realtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Realtime:
    """Run a command in this process. Returns its status, output and error output."""
    for name in os.environ:
        if name.startswith(("REALTIME_", "CENTRIFUGO_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, config: str | None = None) -> tuple[int, str, str]:
        if config is not None:
            (tmp_path / "realtime.toml").write_text(config)
            arguments = (*arguments, "-c", "realtime.toml")
        monkeypatch.setattr(sys, "argv", ["realtime", *arguments])
        try:
            status = main.main()
        except SystemExit as exit:
            status = int(exit.code or 0)
        return status, *capsys.readouterr()

    return run


ONE = f"[client.token]\nhmac_secret_key = '{SECRET}'"
TWO = f"{ONE}\n[client.subscription_token]\nenabled = true\nhmac_secret_key = '{OTHER}'"


def claims_of(token: str, secret: str = SECRET) -> dict[str, Any]:
    return jwt.decode(token, secret, ["HS256"], options={"verify_aud": False})


@pytest.mark.parametrize("name", ["gen-token", "gentoken"])
def test_a_connection_token(realtime: Realtime, name: str) -> None:
    status, out, errors = realtime(name, "-u", "42", config=ONE)
    assert (status, errors) == (0, "")
    first, token = out.splitlines()
    assert first == 'token of user "42", good for 168h:'
    claims = claims_of(token)
    assert claims.keys() == {"sub", "iat", "exp"}
    assert claims["sub"] == "42"
    assert claims["exp"] - claims["iat"] == 604_800
    assert abs(claims["iat"] - time.time()) < 60


@pytest.mark.parametrize(
    ("ttl", "seconds"), [("60", 60), ("1m", 60), ("1h30m", 5400), ("1.5s", 1), ("-1", None), ("100000", 100_000)]
)
def test_the_lifetime(realtime: Realtime, ttl: str, seconds: int | None) -> None:
    status, token, _ = realtime("gen-token", "--ttl", ttl, "--quiet", config=ONE)
    assert status == 0
    claims = claims_of(token)
    assert claims.get("exp") == (None if seconds is None else claims["iat"] + seconds)
    assert claims["sub"] == ""


@pytest.mark.parametrize("ttl", ["0", "-2", "x", "1d", "300ms", "", "99999999999", "9" * 5000])
def test_an_invalid_lifetime_is_wrong_usage(realtime: Realtime, ttl: str) -> None:
    status, out, errors = realtime("gen-token", "--ttl", ttl, config=ONE)
    assert (status, out) == (2, "")
    assert "-1 for a token without end" in errors


def test_quiet_prints_only_the_token(realtime: Realtime) -> None:
    _, out, _ = realtime("gen-token", "-q", config=ONE)
    assert not out.endswith("\n")
    assert out.count(".") == 2


@pytest.mark.parametrize(("config", "secret"), [(ONE, SECRET), (TWO, OTHER)])
@pytest.mark.parametrize("name", ["gen-sub-token", "gensubtoken"])
def test_a_subscription_token_is_signed_with_the_key_of_its_table(
    realtime: Realtime, name: str, config: str, secret: str
) -> None:
    status, out, _ = realtime(name, "-u", "42", "-s", "$chat", config=config)
    assert status == 0
    first, token = out.splitlines()
    assert first == 'token of user "42" and channel "$chat", good for 168h:'
    assert claims_of(token, secret)["channel"] == "$chat"
    status, _, errors = realtime(name, "-u", "42", config=config)
    assert status == 2
    assert "--channel" in errors


def test_a_token_has_the_claims_that_the_server_requires(realtime: Realtime) -> None:
    config = f"{ONE}\naudience = 'chat'\nissuer = 'tests'\nuser_id_claim = 'user_id'"
    status, token, _ = realtime("gen-token", "-q", "-u", "42", config=config)
    assert status == 0
    claims = claims_of(token)
    assert (claims["aud"], claims["iss"], claims["user_id"]) == ("chat", "tests", "42")
    assert "sub" not in claims
    assert realtime("check-token", token, config=config)[0] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "client.token.hmac_secret_key: empty"),
        (f"{ONE}\njwks_public_endpoint = 'https://id.example/keys'", "client.token.jwks_public_endpoint: the server"),
        (
            f"{ONE}\nissuer_regex = '^https:'",
            "client.token: the server would refuse the token: iss does not match its pattern",
        ),
        (f"{ONE}\nmax_length = 10", "client.token: the server would refuse the token: too long"),
        ("[client.token]\nhmac = 5", "realtime.toml:2: client.token.hmac: unknown key"),
        ("[client", "realtime.toml:1: "),
    ],
)
def test_no_token_is_made_that_the_server_would_refuse(realtime: Realtime, config: str, message: str) -> None:
    status, out, errors = realtime("gen-token", config=config)
    assert (status, out) == (EX_CONFIG, "")
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def test_the_table_of_subscription_tokens_inherits_no_key(realtime: Realtime) -> None:
    config = f"{ONE}\n[client.subscription_token]\nenabled = true"
    status, _, errors = realtime("gen-sub-token", "-s", "news", config=config)
    assert status == EX_CONFIG
    assert errors.startswith("client.subscription_token.hmac_secret_key: empty")


def test_a_user_id_of_any_characters(realtime: Realtime) -> None:
    for user in ("é", '"', "\n", "\udcff"):
        status, out, errors = realtime("gen-token", "-u", user, config=ONE)
        assert len((out or errors).splitlines()) == (2 if status == 0 else 1)
        assert status == (EX_CONFIG if user == "\udcff" else 0)


# check-token.


@pytest.mark.parametrize("name", ["check-token", "checktoken"])
def test_a_good_token(realtime: Realtime, name: str) -> None:
    token = jwt.encode({"sub": "42", "exp": 4_000_000_000, "info": {"name": "é"}, "x": [1]}, SECRET)
    status, out, errors = realtime(name, token, config=ONE)
    assert (status, errors) == (0, "")
    first, _, claims = out.partition("\n")
    assert first == 'good: user "42", until 2096-10-02 07:06:40 UTC'
    assert json.loads(claims) == {"sub": "42", "exp": 4_000_000_000, "info": {"name": "é"}, "x": [1]}
    assert out.isascii()


@pytest.mark.parametrize("name", ["check-sub-token", "checksubtoken"])
def test_a_good_subscription_token(realtime: Realtime, name: str) -> None:
    token = jwt.encode({"sub": "42", "channel": "news", "exp": 2**53, "expire_at": 0}, OTHER)
    status, out, _ = realtime(name, token, config=TWO)
    assert status == 0
    assert out.startswith('good: user "42", subscribes to "news", never expires\n')
    assert realtime(name, jwt.encode({"channel": "news", "exp": 2**53}, OTHER), config=TWO)[0] == 0


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "not three parts"),
        ("hush", "not three parts"),
        (jwt.encode({"sub": "42"}, OTHER), "not signed by a known key"),
        (jwt.encode({"sub": "42", "exp": 1}, SECRET), "it has expired"),
        (jwt.encode({"sub": "42", "channel": "news"}, SECRET), "can't open a connection"),
        (jwt.encode({"sub": "42", "b64info": "!"}, SECRET), "b64info is not base64"),
        (jwt.encode({"exp": 4_000_000_000}, SECRET), "it has no user"),
    ],
)
def test_a_token_that_is_refused(realtime: Realtime, token: str, message: str) -> None:
    config = f"client.disallow_anonymous_connection_tokens = true\n{ONE}"
    status, out, errors = realtime("check-token", token, config=config)
    assert (status, out) == (1, "")
    assert errors.startswith("refused: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_tokens_signed_by_public_keys(realtime: Realtime) -> None:
    elliptic = ec.generate_private_key(ec.SECP256R1())
    pems = [
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        for key in (KEY, elliptic)
    ]
    config = f'[client.token]\nrsa_public_key = """{pems[0]}"""\necdsa_public_key = """{pems[1]}"""'
    for key, algorithm in ((KEY, "RS256"), (elliptic, "ES256")):
        status, out, _ = realtime("check-token", jwt.encode({"sub": "42"}, key, algorithm), config=config)
        assert status == 0
        assert out.startswith('good: user "42"')


class Provider(http.server.BaseHTTPRequestHandler):
    """Publishes KEY at /keys, and redirects other paths to it."""

    def do_GET(self) -> None:
        body = b""
        if self.path == "/keys":
            described = jwt.get_algorithm_by_name("RS256").to_jwk(KEY.public_key(), as_dict=True)
            body = json.dumps({"keys": [described | {"kid": "one", "use": "sig"}]}).encode()
            self.send_response(200)
        else:
            self.send_response(302)
            self.send_header("Location", "/keys")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def provider() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_key_set_is_fetched(realtime: Realtime, provider: str) -> None:
    config = f"[client.token]\njwks_public_endpoint = '{provider}/keys'\njwks_allow_insecure = true"
    status, out, _ = realtime("check-token", jwt.encode({"sub": "42"}, KEY, "RS256", {"kid": "one"}), config=config)
    assert status == 0
    assert out.startswith('good: user "42"')
    status, _, errors = realtime("check-token", jwt.encode({}, KEY, "RS256", {"kid": "two"}), config=config)
    assert (status, errors) == (1, "refused: not signed by a known key\n")


def test_a_key_set_of_an_allowed_host(realtime: Realtime, provider: str) -> None:
    config = f"[client.token]\njwks_public_endpoint = '{provider}/keys'\njwks_allowed_hosts = ['127.0.0.1']"
    status, *_ = realtime("check-token", jwt.encode({"sub": "42"}, KEY, "RS256", {"kid": "one"}), config=config)
    assert status == 0


def test_an_unavailable_key_set(realtime: Realtime, provider: str) -> None:
    token = jwt.encode({"sub": "42"}, KEY, "RS256", {"kid": "one"})
    for address, allowed, message in (
        (f"{provider}/elsewhere", "true", "status 302"),
        ("http://127.0.0.1:1/keys", "true", "URLError"),
        (f"{provider}/keys".replace("http:", "https:"), "false", "the address is not public"),
    ):
        config = f"[client.token]\njwks_public_endpoint = '{address}'\njwks_allow_insecure = {allowed}"
        status, out, errors = realtime("check-token", token, config=config)
        assert (status, out) == (1, "")
        assert errors == f"not verified: no key set from 127.0.0.1: {message}\n"


def test_the_help_lists_the_commands() -> None:
    text = build_parser().format_help()
    for name in ("gen-token", "gen-sub-token", "check-token", "check-sub-token"):
        assert name in text


def test_a_weak_secret_makes_a_token_without_warnings_and_without_twisted(tmp_path: Path) -> None:
    """In its own process, where no test configuration hides the warnings of libraries."""
    environ = os.environ | {"REALTIME_CLIENT_TOKEN_HMAC_SECRET_KEY": "secret", "PYTHONPATH": str(ROOT)}
    code = "import sys, realtime.cli.main as m; s = m.main(); sys.exit(s or ('twisted' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, "gen-token", "-q"], cwd=tmp_path, env=environ, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(base64.urlsafe_b64decode(done.stdout.split(b".")[0] + b"==")) == {"alg": "HS256", "typ": "JWT"}
