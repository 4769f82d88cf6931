"""JSON Web Tokens that admit a connection or a subscription (RFC 7519; claims of the Centrifuge protocol).

The algorithm is fixed by the keys of the configuration, never by the token's header (RFC 8725 section 3.1). A token
is either good, expired (the client may fetch a new one), or invalid; which of its parts was wrong is nobody's
business but the operator's.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Callable
from typing import Any

import jwt
import msgspec
from msgspec import Struct

from realtime.errors import ClientError, RealtimeError
from realtime.protocol.messages import payload
from realtime.settings import Token

HMAC_ALGORITHMS = ["HS256", "HS384", "HS512"]

# A short key is the operator's choice, and `check-config` warns of it once: not the library, at every token.
warnings.filterwarnings("ignore", category=jwt.warnings.InsecureKeyLengthWarning)

# The channel options that a token may set for its own subscription.
OVERRIDABLE = ("presence", "join_leave", "force_push_join_leave", "force_recovery", "force_positioning")

# Seconds since 1970 that a JSON number carries exactly.
_LATEST = 2**53


class TokenInvalid(RealtimeError):
    """The token is not one that we accept. The text says why, for the log; the client learns only "invalid"."""


class TokenExpired(RealtimeError):
    """The token was good once, or will be (`nbf`)."""


class SubOptions(Struct, frozen=True):
    """How a token wants one subscription to be.

    info: shown to others in the channel; data: goes back to the client; both JSON text, or b"". override: values that
    take the place of the channel's own, by the names of OVERRIDABLE.
    """

    info: bytes = b""
    data: bytes = b""
    override: dict[str, bool] = {}


class Claims(Struct, frozen=True):
    """What a good token says.

    user: its `sub`, "" for anonymous. info, data: JSON text, or b"". expire_at: Unix seconds at which what the token
    admitted ends, 0.0 for never. channel, client, override: of a subscription token; `override` as in SubOptions.
    channels, subs: to which a connection token subscribes the client, without or with options; where there are `subs`,
    there are no `channels`. meta: JSON text of an object that stays with the connection and is never sent, or b"".
    """

    user: str
    info: bytes = b""
    data: bytes = b""
    expire_at: float = 0.0
    channel: str = ""
    client: str = ""
    override: dict[str, bool] = {}
    channels: tuple[str, ...] = ()
    subs: dict[str, SubOptions] = {}
    meta: bytes = b""


class TokenVerifier:
    """Judges tokens by one configuration. `clock` gives Unix seconds."""

    def __init__(self, settings: Token, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock

    async def connection(self, token: str) -> Claims:
        """The claims of a connection token. Raises TokenInvalid or TokenExpired."""
        claims = self._verified(token)
        if "channel" in claims:
            raise TokenInvalid("a subscription token can't open a connection")
        return self._claims(claims)

    async def subscription(self, token: str) -> Claims:
        """The claims of a subscription token. Raises TokenInvalid or TokenExpired."""
        claims = self._verified(token)
        if not _text(claims, "channel"):
            raise TokenInvalid("a subscription token names its channel")
        return self._claims(claims)

    def _keys(self) -> list[str]:
        """The keys that may have signed: the current one, then the one it replaced while that is still valid."""
        settings = self._settings
        keys = [settings.hmac_secret_key]
        until = settings.hmac_previous_secret_key_valid_until
        if not until or self._clock() < until:
            keys.append(settings.hmac_previous_secret_key)
        return [key for key in keys if key]

    def _verified(self, token: str) -> dict[str, Any]:
        settings = self._settings
        if settings.max_length and len(token) > settings.max_length:
            raise TokenInvalid("too long")
        reason: Exception | None = None
        for key in self._keys():
            try:
                return jwt.decode(
                    token,
                    key,
                    algorithms=HMAC_ALGORITHMS,
                    audience=settings.audience or None,
                    issuer=settings.issuer or None,
                    # Time is judged below, by our clock; and only when all else is right.
                    options={
                        "verify_exp": False,
                        "verify_nbf": False,
                        "verify_iat": False,
                        "verify_aud": bool(settings.audience),
                        "verify_iss": bool(settings.issuer),
                        "verify_sub": False,
                        "verify_jti": False,
                    },
                )
            except jwt.InvalidSignatureError as error:
                reason = error
            except (jwt.PyJWTError, ValueError, RecursionError) as error:
                raise TokenInvalid(str(error)) from None
        raise TokenInvalid(str(reason or "no key is configured"))

    def _claims(self, claims: dict[str, Any]) -> Claims:
        now = self._clock()
        expires, not_before = _seconds(claims, "exp"), _seconds(claims, "nbf")
        expire_at = _seconds(claims, "expire_at") if "expire_at" in claims else expires
        accepted = Claims(
            user=_text(claims, "sub"),
            info=_json(claims, "info"),
            data=_json(claims, "data"),
            expire_at=expire_at or 0.0,
            channel=_text(claims, "channel"),
            client=_text(claims, "client"),
        )
        if (expires is not None and expires <= now) or (not_before is not None and not_before > now):
            raise TokenExpired("expired, or not valid yet")
        return accepted


def _text(claims: dict[str, Any], name: str) -> str:
    value = claims.get(name, "")
    if not isinstance(value, str):
        raise TokenInvalid(f"{name} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TokenInvalid(f"{name} is no Unicode text") from None
    return value


def _seconds(claims: dict[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LATEST:
        raise TokenInvalid(f"{name} is not a number of seconds")
    return float(value)


def _json(claims: dict[str, Any], name: str) -> bytes:
    """The JSON text of a claim, from its base64 form where that is given. It ends up in messages to other clients."""
    encoded = _text(claims, "b64" + name)
    try:
        if encoded:
            text = base64.b64decode(encoded, validate=True)
            text.decode()
            return payload(msgspec.json.decode(text, type=msgspec.Raw))
        return msgspec.json.encode(claims[name]) if claims.get(name) is not None else b""
    except binascii.Error:
        raise TokenInvalid(f"b64{name} is not base64") from None
    except (ValueError, RecursionError, msgspec.MsgspecError, ClientError):
        raise TokenInvalid(f"{name} is no JSON that can be passed on") from None
