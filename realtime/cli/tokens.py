"""What `realtime gen-token` and `check-token` do: tokens made and judged as the configuration says."""

from __future__ import annotations

import base64
import hmac
import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from realtime.auth.keys import MAX_SET_BYTES, VerificationKey, is_public, key_set
from realtime.auth.tokens import Claims, TokenExpired, TokenInvalid, TokenVerifier
from realtime.config.settings import ClientSettings, TokenSettings
from realtime.errors import KeysUnavailable, RealtimeError, SettingsError

# Seconds to wait for a key set.
_FETCH_LIMIT = 5.0
# The last second that has a date of four digits.
_YEAR_9999 = 253_402_300_799


class TokenRefused(RealtimeError):
    """The server would not take the token. The text says why, in one line."""


def made(settings: ClientSettings, user: str, ttl: int | None, channel: str = "") -> str:
    """A token of `user`, signed with HS256: for a connection, or for a subscription to `channel`.

    ttl: seconds, None for a token that does not expire. Raises SettingsError when the configuration has no key to sign
    with, or when the server would refuse what is signed so.
    """
    name, table = _table(settings, bool(channel))
    if table.jwks_public_endpoint:
        raise SettingsError([f"{name}.jwks_public_endpoint: only tokens of that provider are good; ask it for one"])
    if not table.hmac_secret_key:
        raise SettingsError([f"{name}.hmac_secret_key: empty, and tokens are made with it; set it"])
    now = int(time.time())
    claims: dict[str, Any] = {table.user_id_claim or "sub": user, "iat": now}
    if ttl is not None:
        claims["exp"] = now + ttl
    for claim, text in (("channel", channel), ("aud", table.audience), ("iss", table.issuer)):
        if text:
            claims[claim] = text
    token = _signed(claims, table.hmac_secret_key)
    try:
        judged(settings, token, bool(channel))
    except TokenRefused as error:
        raise SettingsError([f"{name}: the server would refuse the token: {error}"]) from None
    return token


def judged(settings: ClientSettings, token: str, subscription: bool) -> tuple[Claims, dict[str, Any]]:
    """What the server makes of a token, and all claims that are in it. Raises Refused, or KeysUnavailable."""
    _, table = _table(settings, subscription)
    verifier = TokenVerifier(table, time.time, _Provider(table.jwks_allow_insecure))
    try:
        claims = _result(verifier.subscription(token) if subscription else verifier.connection(token))
    except TokenExpired:
        raise TokenRefused("it has expired, or is not valid yet") from None
    except TokenInvalid as error:
        raise TokenRefused(str(error)) from None
    if not subscription and not claims.user and settings.disallow_anonymous_connection_tokens:
        raise TokenRefused("it has no user, and client.disallow_anonymous_connection_tokens is set")
    return claims, json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))


def shown(claims: Claims, everything: dict[str, Any]) -> str:
    """What a good token says, for a terminal."""
    what = f" subscribes to {json.dumps(claims.channel)}," if claims.channel else ""
    ends = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(claims.expire_at, _YEAR_9999)))
    until = f"until {ends}" if claims.expire_at else "for ever"
    return f"good: user {json.dumps(claims.user)},{what} {until}\n{json.dumps(everything, indent=2)}"


def _result(judging: Coroutine[Any, Any, Claims]) -> Claims:
    """What a coroutine returns that never waits: here, a key set is fetched while everything stands still."""
    try:
        judging.send(None)
    except StopIteration as ended:
        claims: Claims = ended.value
        return claims
    raise AssertionError("it waits")


def _signed(claims: dict[str, Any], secret: str) -> str:
    """RFC 7515 section 3.1, with HS256."""
    parts = [_base64url(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    signature = hmac.digest(secret.encode(), ".".join(parts).encode(), "sha256")
    return ".".join([*parts, _base64url(signature)])


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _table(settings: ClientSettings, subscription: bool) -> tuple[str, TokenSettings]:
    if subscription and settings.subscription_token.enabled:
        return "client.subscription_token", settings.subscription_token
    return "client.token", settings.token


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *request: Any) -> None:
        """Follow none, as the server does."""


class _Provider:
    """Key sets, each fetched when a key is asked for; by the rules of the server, but without its reactor."""

    def __init__(self, allow_insecure: bool) -> None:
        self._allow_insecure = allow_insecure

    async def key(self, endpoint: str, kid: str) -> VerificationKey | None:
        try:
            return key_set(self._fetched(endpoint)).get(kid)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            raise KeysUnavailable(f"no key set from {urlsplit(endpoint).hostname}: {reason}") from None

    def _fetched(self, endpoint: str) -> bytes:
        url = urlsplit(endpoint)
        found = socket.getaddrinfo(url.hostname, url.port or url.scheme, type=socket.SOCK_STREAM)
        if not self._allow_insecure and not all(is_public(str(entry[4][0])) for entry in found):
            raise KeysUnavailable(f"no key set from {url.hostname}: the address is not public")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
        with opener.open(endpoint, timeout=_FETCH_LIMIT) as response:
            return bytes(response.read(MAX_SET_BYTES + 1))
