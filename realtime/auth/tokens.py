"""JSON Web Tokens that admit a connection or a subscription (RFC 7519; claims of the Centrifuge protocol).

The algorithm is fixed by the keys of the configuration, never by the token's header (RFC 8725 section 3.1), and
nothing in a header is followed or trusted: of all its members, `kid` alone chooses, among the keys that we have. A
token is either good, expired (the client may fetch a new one), or invalid; which of its parts was wrong is nobody's
business but the operator's.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.json import Decoder

from realtime.auth.keys import MAX_KID, PUBLISHED, KeySource, VerificationKey, public_key, secret_key
from realtime.config.settings import PLACEHOLDER, TokenSettings, listed_groups
from realtime.errors import ClientError, KeysUnavailable, RealtimeError
from realtime.json_text import payload
from realtime.metrics import Metrics

# The channel options that a token may set for its own subscription.
OVERRIDABLE = ("presence", "join_leave", "force_push_join_leave", "force_recovery", "force_positioning")

# Seconds since 1970 that a JSON number carries exactly.
_LATEST = 2**53

# RFC 7515 section 7.1, and no padding.
_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
# What tokens for us are called: as all tokens, or as access tokens (RFC 9068). A token of another type was made for
# something else (RFC 8725 section 3.11).
_TYPES = ("jwt", "at+jwt")


class TokenInvalid(RealtimeError):
    """The token is not one that we accept. The text says why, to the operator; the client learns only "invalid"."""


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


# The claims of a token, by name, each still as JSON text.
_Unread = dict[str, Raw]


class _Header(Struct, frozen=True):
    """What is read of a header. The last five would change how the token is to be read, and may not be there."""

    alg: str
    kid: Annotated[str, Meta(max_length=MAX_KID)] = ""
    typ: str = "JWT"
    crit: Raw | UnsetType = UNSET
    b64: Raw | UnsetType = UNSET
    zip: Raw | UnsetType = UNSET
    enc: Raw | UnsetType = UNSET
    cty: Raw | UnsetType = UNSET

    @property
    def plain(self) -> bool:
        """Whether it is that of a signed token, as such and for us."""
        strange = (self.crit, self.b64, self.zip, self.enc, self.cty)
        return all(one is UNSET for one in strange) and self.typ.lower().removeprefix("application/") in _TYPES


# What is said of the tokens that are not good, in the metrics.
_REFUSALS = {TokenExpired: "expired", TokenInvalid: "invalid", KeysUnavailable: "unjudged"}


class TokenVerifier:
    """Judges tokens by one table of the configuration."""

    def __init__(
        self,
        settings: TokenSettings,
        clock: Callable[[], float],
        key_sets: KeySource | None = None,
        subscriptions: TokenVerifier | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """clock: Unix seconds. key_sets: where published keys are fetched; without it there are none.

        subscriptions: judges subscription tokens, where these have a table of their own.
        """
        self._settings = settings
        self._clock = clock
        self._key_sets = key_sets
        self._subscriptions = subscriptions
        self._current = [secret_key(text) for text in (settings.hmac_secret_key,) if text]
        self._current += [public_key(text) for text in (settings.rsa_public_key, settings.ecdsa_public_key) if text]
        self._previous = [secret_key(text) for text in (settings.hmac_previous_secret_key,) if text]
        patterns = {"aud": settings.audience_regex, "iss": settings.issuer_regex}
        self._patterns = {name: re.compile(pattern) for name, pattern in patterns.items() if pattern}
        self._listed = {name: texts for pattern in patterns.values() for name, texts in listed_groups(pattern).items()}
        metrics = metrics or Metrics()
        self._counters = {
            outcome: metrics.counter("realtime_tokens", "Tokens of clients, by what was made of them", outcome=outcome)
            for outcome in ("good", *_REFUSALS.values())
        }

    async def connection(self, token: str) -> Claims:
        """The claims of a connection token. Raises TokenInvalid, TokenExpired, or KeysUnavailable."""
        with self._counted():
            claims = await self._verified(token)
            if "channel" in claims:
                raise TokenInvalid("a subscription token can't open a connection")
            return self._read(claims)

    async def subscription(self, token: str) -> Claims:
        """The claims of a subscription token. Raises TokenInvalid, TokenExpired, or KeysUnavailable."""
        if self._subscriptions is not None:
            return await self._subscriptions.subscription(token)
        with self._counted():
            claims = await self._verified(token)
            if not _text(claims, "channel"):
                raise TokenInvalid("a subscription token names its channel")
            return self._read(claims)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count how judging one token ends."""
        try:
            yield
        except (TokenExpired, TokenInvalid, KeysUnavailable) as error:
            self._counters[_REFUSALS[type(error)]].value += 1
            raise
        self._counters["good"].value += 1

    # The order of what follows is the protocol's: a token is told to be expired only when all else is right.

    async def _verified(self, token: str) -> _Unread:
        settings = self._settings
        if settings.max_length and len(token) > settings.max_length:
            raise TokenInvalid("too long")
        parts = _COMPACT.fullmatch(token)
        if parts is None:
            raise TokenInvalid("not three parts in base64url")
        head, body, signature = map(_bytes, parts.groups())
        try:
            body.decode()  # the JSON reader looks at the strings that it makes, but some are passed on unread
        except UnicodeDecodeError:
            raise TokenInvalid("not UTF-8") from None
        header: _Header = _decoded(head, _HEADER, "header")
        if not header.plain:
            raise TokenInvalid("not a plain signed token")
        claims: _Unread = _decoded(body, _BODY, "body")
        groups = self._groups(claims)
        signed = token.rpartition(".")[0].encode()
        if not any(key.verifies(header.alg, signed, signature) for key in await self._keys(header, groups)):
            raise TokenInvalid("not signed by a key that we know")
        if settings.audience and settings.audience not in _texts(claims, "aud"):
            raise TokenInvalid("aud is another")
        if settings.issuer and settings.issuer != _text(claims, "iss"):
            raise TokenInvalid("iss is another")
        return claims

    def _groups(self, claims: _Unread) -> dict[str, str | None]:
        """The named groups of the patterns in a token that may still be anybody's. Raises TokenInvalid."""
        groups: dict[str, str | None] = {}
        for name, pattern in self._patterns.items():
            found = next((match for text in _texts(claims, name) if (match := pattern.search(text))), None)
            if found is None:
                raise TokenInvalid(f"{name} matches no pattern")
            groups |= found.groupdict()
        return groups

    async def _keys(self, header: _Header, groups: dict[str, str | None]) -> list[VerificationKey]:
        """The keys that may have signed."""
        if not self._settings.jwks_public_endpoint:
            until = self._settings.hmac_previous_secret_key_valid_until
            return self._current if until and self._clock() >= until else self._current + self._previous
        if not header.kid or header.alg not in PUBLISHED:
            raise TokenInvalid("no kid, or an algorithm without public keys")
        if self._key_sets is None:
            raise KeysUnavailable("nobody fetches keys here")
        key = await self._key_sets.key(self._endpoint(groups), header.kid)
        return [key] if key is not None else []

    def _endpoint(self, groups: dict[str, str | None]) -> str:
        """The address of the key set. Whatever the token says, only what the configuration lists gets into it."""

        def listed(placeholder: re.Match[str]) -> str:
            text = groups.get(placeholder[1])
            if text is None or text not in self._listed.get(placeholder[1], ()):
                raise TokenInvalid("names a key set that is not listed")
            return text

        return PLACEHOLDER.sub(listed, self._settings.jwks_public_endpoint)

    def _read(self, claims: _Unread) -> Claims:
        now = self._clock()
        expires, not_before = _seconds(claims, "exp"), _seconds(claims, "nbf")
        expire_at = _seconds(claims, "expire_at")
        subs = _claim(claims, "subs", _SUBS) or {}
        accepted = Claims(
            user=_text(claims, self._settings.user_id_claim or "sub"),
            info=_embedded(claims.get("info", UNSET), _text(claims, "b64info"), "info"),
            data=_embedded(claims.get("data", UNSET), _text(claims, "b64data"), "data"),
            expire_at=(expires if expire_at is None else expire_at) or 0.0,
            channel=_text(claims, "channel"),
            client=_text(claims, "client"),
            override=_overridden(_claim(claims, "override", _OBJECT)),
            channels=() if subs else _channels(_claim(claims, "channels", _LIST) or ()),
            subs=dict(zip(_channels(subs), map(_options, subs.values()), strict=True)),
            meta=_object(claims, "meta"),
        )
        if (expires is not None and expires <= now) or (not_before is not None and not_before > now):
            raise TokenExpired("expired, or not valid yet")
        return accepted


# -- reading ----------------------------------------------------------------------------------------------------------


class _Override(Struct, frozen=True):
    value: bool


class _Sub(Struct, frozen=True):
    """The options of one channel in `subs`. Of `override`, names that we do not know are for other servers."""

    info: Raw | UnsetType = UNSET
    b64info: str = ""
    data: Raw | UnsetType = UNSET
    b64data: str = ""
    override: dict[str, Raw] | None = None


_HEADER = Decoder(_Header)
_BODY = Decoder(_Unread)
_TEXT = Decoder(str)
_TEXTS = Decoder(str | list[str])
_NUMBER = Decoder(float | None)
_LIST = Decoder(list[str] | None)
_OBJECT = Decoder(dict[str, Raw] | None)
_SUBS = Decoder(dict[str, _Sub] | None)
_OVERRIDE = Decoder(_Override | None)
_ANY = Decoder(Raw)


def _bytes(part: str) -> bytes:
    """Decodes base64url. Raises TokenInvalid, also for a second spelling of the same bytes."""
    try:
        raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except ValueError:
        raise TokenInvalid("not base64url") from None
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != part.encode():
        raise TokenInvalid("not base64url")
    return raw


def _decoded(text: bytes | Raw, decoder: Decoder[Any], name: str) -> Any:
    """What a decoder makes of JSON text. Raises TokenInvalid, naming the part or claim."""
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError):
        raise TokenInvalid(f"{name} is not as it should be") from None


def _claim(claims: _Unread, name: str, decoder: Decoder[Any]) -> Any:
    """One claim, None when it is absent."""
    return _decoded(claims[name], decoder, name) if name in claims else None


def _text(claims: _Unread, name: str) -> str:
    """A text, "" when it is absent."""
    return _claim(claims, name, _TEXT) or ""


def _texts(claims: _Unread, name: str) -> list[str]:
    """The text of `iss`, or those of `aud`, which may be several; none when it is absent."""
    found = _claim(claims, name, _TEXTS if name == "aud" else _TEXT)
    return [found] if isinstance(found, str) else found or []


def _seconds(claims: _Unread, name: str) -> float | None:
    value: float | None = _claim(claims, name, _NUMBER)
    if value is not None and not 0 <= value <= _LATEST:
        raise TokenInvalid(f"{name} is not a number of seconds")
    return value


def _channels(names: Collection[str]) -> tuple[str, ...]:
    if not all(names):
        raise TokenInvalid("a channel without a name")
    return tuple(names)


def _options(wanted: _Sub) -> SubOptions:
    return SubOptions(
        _embedded(wanted.info, wanted.b64info, "info"),
        _embedded(wanted.data, wanted.b64data, "data"),
        _overridden(wanted.override),
    )


def _overridden(wanted: dict[str, Raw] | None) -> dict[str, bool]:
    known = {name: _decoded(raw, _OVERRIDE, name) for name, raw in (wanted or {}).items() if name in OVERRIDABLE}
    return {name: override.value for name, override in known.items() if override is not None}


def _object(claims: _Unread, name: str) -> bytes:
    """The JSON text of an object."""
    _claim(claims, name, _OBJECT)
    return _embedded(claims.get(name, UNSET), "", name)


def _embedded(raw: Raw | UnsetType, encoded: str, name: str) -> bytes:
    """The JSON text of a claim, from its base64 form where that is given. It ends up in messages to other clients."""
    try:
        if encoded:
            text = base64.b64decode(encoded, validate=True)
            text.decode()
            raw = _decoded(text, _ANY, name)
        return payload(raw) if raw is not UNSET and bytes(raw) != b"null" else b""
    except (ValueError, ClientError):
        raise TokenInvalid(f"{name} is no JSON that can be passed on") from None
