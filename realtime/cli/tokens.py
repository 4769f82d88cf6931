"""The work of `realtime gen-token` and `check-token`: makes and verifies tokens by the server's own configuration."""

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

# Time limit for fetching a key set, in seconds.
_FETCH_LIMIT = 5.0
# The last second of the year 9999: later dates have no four-digit year.
_YEAR_9999 = 253_402_300_799


class TokenRefused(RealtimeError):
    """The server would refuse the token. The text gives the reason in one line."""


def make_token(settings: ClientSettings, user: str, ttl: int | None, channel: str = "") -> str:
    """Return a token of `user`, signed with HS256: a connection token, or a subscription token for `channel`.

    ttl: lifetime in seconds, None for a token that never expires. Raises SettingsError when the configuration has no
    signing key, or when the server would refuse the token.
    """
    name, table = _token_table(settings, bool(channel))
    if table.jwks_public_endpoint:
        raise SettingsError(
            [f"{name}.jwks_public_endpoint: the server accepts only tokens of this provider; ask it for one"]
        )
    if not table.hmac_secret_key:
        raise SettingsError([f"{name}.hmac_secret_key: empty, but tokens are signed with it; set it"])
    now = int(time.time())
    claims: dict[str, Any] = {table.user_id_claim or "sub": user, "iat": now}
    if ttl is not None:
        claims["exp"] = now + ttl
    for claim, text in (("channel", channel), ("aud", table.audience), ("iss", table.issuer)):
        if text:
            claims[claim] = text
    token = _sign(claims, table.hmac_secret_key)
    try:
        verify_token(settings, token, bool(channel))
    except TokenRefused as error:
        raise SettingsError([f"{name}: the server would refuse the token: {error}"]) from None
    return token


def verify_token(settings: ClientSettings, token: str, is_subscription: bool) -> tuple[Claims, dict[str, Any]]:
    """Verify a token as the server does. Return its claims as the server reads them, and all claims in it.

    Raises TokenRefused, or KeysUnavailable when its key set can't be fetched.
    """
    _, table = _token_table(settings, is_subscription)
    verifier = TokenVerifier(table, time.time, _BlockingKeySource(table))
    try:
        claims = _run(verifier.subscription(token) if is_subscription else verifier.connection(token))
    except TokenExpired:
        raise TokenRefused("it has expired, or is not valid yet") from None
    except TokenInvalid as error:
        raise TokenRefused(str(error)) from None
    if not is_subscription and not claims.user and settings.disallow_anonymous_connection_tokens:
        raise TokenRefused("it has no user, and client.disallow_anonymous_connection_tokens is set")
    return claims, json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))


def describe_token(claims: Claims, all_claims: dict[str, Any]) -> str:
    """Return the text that a terminal shows for a good token."""
    channel = f" subscribes to {json.dumps(claims.channel)}," if claims.channel else ""
    expiry = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(claims.expire_at, _YEAR_9999)))
    validity = f"until {expiry}" if claims.expire_at else "never expires"
    return f"good: user {json.dumps(claims.user)},{channel} {validity}\n{json.dumps(all_claims, indent=2)}"


def _run(verification: Coroutine[Any, Any, Claims]) -> Claims:
    """Run a coroutine that never suspends, since `_BlockingKeySource` blocks while it fetches keys."""
    try:
        verification.send(None)
    except StopIteration as stop:
        claims: Claims = stop.value
        return claims
    raise AssertionError("the coroutine suspended")


def _sign(claims: dict[str, Any], secret: str) -> str:
    """Return a JSON Web Token signed with HS256, in the form of RFC 7515 section 3.1."""
    parts = [_base64url(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    signature = hmac.digest(secret.encode(), ".".join(parts).encode(), "sha256")
    return ".".join([*parts, _base64url(signature)])


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _token_table(settings: ClientSettings, is_subscription: bool) -> tuple[str, TokenSettings]:
    """Return the table that verifies these tokens, with its key in the configuration."""
    if is_subscription and settings.subscription_token.enabled:
        return "client.subscription_token", settings.subscription_token
    return "client.token", settings.token


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *request: Any) -> None:
        """Follow no redirect, as the server does not."""


class _BlockingKeySource:
    """Fetches a key set at each request for a key, by the server's rules but without its reactor."""

    def __init__(self, settings: TokenSettings) -> None:
        self._settings = settings

    async def key(self, endpoint: str, kid: str) -> VerificationKey | None:
        try:
            return key_set(self._fetch(endpoint)).get(kid)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            raise KeysUnavailable(f"no key set from {urlsplit(endpoint).hostname}: {reason}") from None

    def _fetch(self, endpoint: str) -> bytes:
        url = urlsplit(endpoint)
        addresses = socket.getaddrinfo(url.hostname, url.port or url.scheme, type=socket.SOCK_STREAM)
        allowed = self._settings.jwks_allow_insecure or url.hostname in self._settings.jwks_allowed_hosts
        if not allowed and not all(is_public(str(entry[4][0])) for entry in addresses):
            raise KeysUnavailable(f"no key set from {url.hostname}: the address is not public")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
        with opener.open(endpoint, timeout=_FETCH_LIMIT) as response:
            return bytes(response.read(MAX_SET_BYTES + 1))
