"""JSON Web Tokens that admit a connection or a subscription (RFC 7519; claims of the Centrifuge protocol).

The configured keys fix the algorithm, never the token's header (RFC 8725 section 3.1). The verifier trusts no member of
a header; only `kid` has an effect: it selects one of the configured or fetched keys. A token is valid, expired (the
client may fetch a new one) or invalid. The operator learns which part was wrong; the client does not.
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
from realtime.config.checks import PLACEHOLDER, listed_groups
from realtime.config.settings import TokenSettings
from realtime.errors import ClientError, KeysUnavailable, RealtimeError
from realtime.json_text import decode_base64, payload, text_or_bytes
from realtime.metrics import Metrics

# The channel options that a subscription token may override.
OVERRIDABLE = ("presence", "join_leave", "force_push_join_leave", "force_recovery", "force_positioning")

# The latest Unix time in seconds that a JSON number represents exactly.
_LATEST = 2**53

# RFC 7515 section 7.1, and no padding.
_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
# The accepted values of `typ`: any JWT, and access tokens (RFC 9068). A token of another type serves another purpose
# (RFC 8725 section 3.11).
_TYPES = ("jwt", "at+jwt")


class TokenInvalid(RealtimeError):
    """The server does not accept the token. The message tells the operator why; the client learns only "invalid"."""


class TokenExpired(RealtimeError):
    """The token has expired, or is not valid yet (`nbf`)."""


class SubOptions(Struct, frozen=True):
    """The options of one subscription in a token.

    info: shown to other clients in the channel. data: sent to the client. Both are JSON text, other bytes behind
    `json_text.BINARY`, or b"". override: replaces options of the channel; its keys are names of OVERRIDABLE.
    """

    info: bytes = b""
    data: bytes = b""
    override: dict[str, bool] = {}


class Claims(Struct, frozen=True):
    """The claims of a valid token.

    user: the claim `sub`, "" for an anonymous user. info: as in SubOptions. expire_at: Unix seconds at which the
    connection or subscription expires, 0.0 for never. channel, client, data, override: of a subscription token; `data`
    and `override` as in SubOptions. channels, subs: the channels to which a connection token subscribes the client,
    without and with options; `channels` is empty if `subs` is not. meta: JSON text, private to the connection and never
    sent to a client, or b"".
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


# The claims of a token by name, each as undecoded JSON text.
_RawClaims = dict[str, Raw]


class _Header(Struct, frozen=True):
    """The decoded members of a header. The last five change the meaning of a token, and must be absent."""

    alg: str
    kid: Annotated[str, Meta(max_length=MAX_KID)] | None = None
    typ: str | None = None
    crit: Raw | UnsetType = UNSET
    b64: Raw | UnsetType = UNSET
    zip: Raw | UnsetType = UNSET
    enc: Raw | UnsetType = UNSET
    cty: Raw | UnsetType = UNSET

    @property
    def plain(self) -> bool:
        """Whether the header describes a plain signed token of an accepted type."""
        forbidden = (self.crit, self.b64, self.zip, self.enc, self.cty)
        kind = "jwt" if self.typ is None else self.typ.lower().removeprefix("application/")
        return kind in _TYPES and all(one is UNSET for one in forbidden)


# The metric label of each outcome of a refused token.
_REFUSALS = {TokenExpired: "expired", TokenInvalid: "invalid", KeysUnavailable: "unjudged"}


class TokenVerifier:
    """Verifies tokens by one table of the configuration."""

    def __init__(
        self,
        settings: TokenSettings,
        clock: Callable[[], float],
        key_sets: KeySource | None = None,
        subscriptions: TokenVerifier | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """clock: returns Unix seconds. key_sets: fetches published keys; None if there are none.

        subscriptions: verifies subscription tokens if they have their own table; None if this verifier does.
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
            outcome: metrics.counter("realtime_tokens", "Verified tokens of clients, by outcome", outcome=outcome)
            for outcome in ("good", *_REFUSALS.values())
        }

    async def connection(self, token: str) -> Claims:
        """Return the claims of a connection token. Raises TokenInvalid, TokenExpired or KeysUnavailable."""
        with self._count_outcome():
            claims = await self._verify(token)
            if bytes(claims.get("channel", b"null")) not in (b"null", b'""'):
                raise TokenInvalid("a subscription token can't open a connection")
            return self._unless_expired(claims, self._connection_claims(claims))

    async def subscription(self, token: str) -> Claims:
        """Return the claims of a subscription token. Raises TokenInvalid, TokenExpired or KeysUnavailable."""
        if self._subscriptions is not None:
            return await self._subscriptions.subscription(token)
        with self._count_outcome():
            claims = await self._verify(token)
            if not _text(claims, "channel"):
                raise TokenInvalid("a subscription token must name its channel")
            return self._unless_expired(claims, self._subscription_claims(claims))

    @contextmanager
    def _count_outcome(self) -> Iterator[None]:
        """Count the outcome of verifying one token."""
        try:
            yield
        except (TokenExpired, TokenInvalid, KeysUnavailable) as error:
            self._counters[_REFUSALS[type(error)]].value += 1
            raise
        self._counters["good"].value += 1

    # The protocol fixes the order of the checks: a token counts as expired only if everything else is valid.

    async def _verify(self, token: str) -> _RawClaims:
        settings = self._settings
        if settings.max_length and len(token) > settings.max_length:
            raise TokenInvalid("too long")
        parts = _COMPACT.fullmatch(token)
        if parts is None:
            raise TokenInvalid("not three parts in base64url")
        head, body, signature = map(_decode_base64url, parts.groups())
        try:
            body.decode()  # the JSON decoder checks only the strings that it decodes; other text is passed on undecoded
        except UnicodeDecodeError:
            raise TokenInvalid("not UTF-8") from None
        header: _Header = _decode(head, _HEADER, "header")
        if not header.plain:
            raise TokenInvalid("not a plain signed token")
        claims: _RawClaims = _decode(body, _BODY, "body")
        groups = self._match_patterns(claims)
        signed = token.rpartition(".")[0].encode()
        if not any(key.verifies(header.alg, signed, signature) for key in await self._keys(header, groups)):
            raise TokenInvalid("not signed by a known key")
        if settings.audience and settings.audience not in _texts(claims, "aud"):
            raise TokenInvalid("aud differs from the configured audience")
        if settings.issuer and settings.issuer != _text(claims, "iss"):
            raise TokenInvalid("iss differs from the configured issuer")
        return claims

    def _match_patterns(self, claims: _RawClaims) -> dict[str, str | None]:
        """Match `aud` and `iss` of an unverified token; return the named groups. Raises TokenInvalid."""
        groups: dict[str, str | None] = {}
        for name, pattern in self._patterns.items():
            found = next((match for text in _texts(claims, name) if (match := pattern.search(text))), None)
            if found is None:
                raise TokenInvalid(f"{name} does not match its pattern")
            groups |= found.groupdict()
        return groups

    async def _keys(self, header: _Header, groups: dict[str, str | None]) -> list[VerificationKey]:
        """Return the keys that may have signed the token."""
        if not self._settings.jwks_public_endpoint:
            until = self._settings.hmac_previous_secret_key_valid_until
            return self._current if until and self._clock() >= until else self._current + self._previous
        if not header.kid or header.alg not in PUBLISHED:
            raise TokenInvalid("no kid, or an algorithm without public keys")
        if self._key_sets is None:
            raise KeysUnavailable("this process fetches no key sets")
        key = await self._key_sets.key(self._key_set_url(groups), header.kid)
        return [key] if key is not None else []

    def _key_set_url(self, groups: dict[str, str | None]) -> str:
        """Return the URL of the key set. Only texts that the configuration lists can enter it, never others from a
        token."""

        def listed(placeholder: re.Match[str]) -> str:
            text = groups.get(placeholder[1])
            if text is None or text not in self._listed.get(placeholder[1], ()):
                raise TokenInvalid("names a key set that the configuration does not list")
            return text

        return PLACEHOLDER.sub(listed, self._settings.jwks_public_endpoint)

    # Each kind of token has its own claims. A claim of the other kind means nothing, whatever its value.

    def _connection_claims(self, claims: _RawClaims) -> Claims:
        subs = _claim(claims, "subs", _SUBS) or {}
        return Claims(
            user=self._user(claims),
            info=_embedded(claims.get("info", UNSET), _text(claims, "b64info"), "info"),
            expire_at=_expire_at(claims),
            channels=() if subs else _channels(_claim(claims, "channels", _LIST) or ()),
            subs=dict(zip(_channels(subs), (_sub_options(sub or _Sub()) for sub in subs.values()), strict=True)),
            meta=_embedded(claims.get("meta", UNSET), "", "meta"),
        )

    def _subscription_claims(self, claims: _RawClaims) -> Claims:
        return Claims(
            user=self._user(claims),
            info=_embedded(claims.get("info", UNSET), _text(claims, "b64info"), "info"),
            data=_embedded(claims.get("data", UNSET), _text(claims, "b64data"), "data"),
            expire_at=_expire_at(claims),
            channel=_text(claims, "channel"),
            client=_text(claims, "client"),
            override=_read_override(_claim(claims, "override", _OBJECT)),
        )

    def _user(self, claims: _RawClaims) -> str:
        """Return the user's id. A claim of the application's own may be a whole number; `sub` is text (RFC 7519)."""
        name = self._settings.user_id_claim
        if name and _WHOLE_NUMBER.fullmatch(number := bytes(claims.get(name, b""))):
            return number.decode()
        return _text(claims, name or "sub")

    def _unless_expired(self, claims: _RawClaims, accepted: Claims) -> Claims:
        now = self._clock()
        expires, not_before = _numeric_date(claims, "exp"), _numeric_date(claims, "nbf")
        if expires is not None and expires <= now:
            raise TokenExpired("expired")
        if not_before is not None and not_before > now + self._settings.leeway:
            raise TokenExpired("not valid yet")
        return accepted


# -- reading ----------------------------------------------------------------------------------------------------------


class _Override(Struct, frozen=True):
    value: bool | None = None


class _Sub(Struct, frozen=True):
    """The options of one channel in `subs`. Unknown names in `override` are ignored; they are for other servers."""

    info: Raw | UnsetType = UNSET
    b64info: str | None = None
    data: Raw | UnsetType = UNSET
    b64data: str | None = None
    override: dict[str, Raw] | None = None


_HEADER = Decoder(_Header)
_BODY = Decoder(_RawClaims)
_TEXT = Decoder(str | None)
_TEXTS = Decoder(str | list[str] | None)
_NUMBER = Decoder(float | None)
_LIST = Decoder(list[str | None] | None)
_OBJECT = Decoder(dict[str, Raw] | None)
_SUBS = Decoder(dict[str, _Sub | None] | None)
_OVERRIDE = Decoder(_Override | None)

# Numbers of up to 64 bits, as their issuer wrote them.
_WHOLE_NUMBER = re.compile(rb"0|-?[1-9][0-9]{0,19}")
# Some issuers write times in quotes.
_QUOTED_NUMBER = re.compile(rb'"(-?[0-9.eE+-]{1,32})"')


def _decode_base64url(part: str) -> bytes:
    """Decode base64url. Raises TokenInvalid, also for a non-canonical spelling."""
    try:
        raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except ValueError:
        raise TokenInvalid("not base64url") from None
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != part.encode():
        raise TokenInvalid("not base64url")
    return raw


def _decode(text: bytes | Raw, decoder: Decoder[Any], name: str) -> Any:
    """Decode JSON text. Raises TokenInvalid with the name of the part or claim."""
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError):
        raise TokenInvalid(f"{name} is malformed") from None


def _claim(claims: _RawClaims, name: str, decoder: Decoder[Any]) -> Any:
    """Return a claim, or None if it is absent or null."""
    return _decode(claims[name], decoder, name) if name in claims else None


def _text(claims: _RawClaims, name: str) -> str:
    """Return a text claim, or "" if it is absent or null."""
    return _claim(claims, name, _TEXT) or ""


def _texts(claims: _RawClaims, name: str) -> list[str]:
    """Return the text of `iss` or the texts of `aud`, which may have several; [] if it is absent."""
    found = _claim(claims, name, _TEXTS if name == "aud" else _TEXT)
    return [found] if isinstance(found, str) else found or []


def _seconds(claims: _RawClaims, name: str) -> float | None:
    value: float | None = _claim(claims, name, _NUMBER)
    if value is not None and not 0 <= value <= _LATEST:
        raise TokenInvalid(f"{name} is not a number of seconds")
    return value


def _numeric_date(claims: _RawClaims, name: str) -> float | None:
    """Return `exp` or `nbf` in Unix seconds, None if it is absent. The number may stand in quotes."""
    quoted = _QUOTED_NUMBER.fullmatch(bytes(claims.get(name, b"")))
    return _seconds({name: Raw(quoted[1])} if quoted else claims, name)


def _expire_at(claims: _RawClaims) -> float:
    """Return the time at which the connection or subscription expires, 0.0 for never."""
    expire_at = _seconds(claims, "expire_at")
    return (_numeric_date(claims, "exp") if expire_at is None else expire_at) or 0.0


def _channels(names: Collection[str | None]) -> tuple[str, ...]:
    """Return the names of channels without null. Raises TokenInvalid for an empty one."""
    if "" in names:
        raise TokenInvalid("a channel has no name")
    return tuple(filter(None, names))


def _sub_options(sub: _Sub) -> SubOptions:
    return SubOptions(
        _embedded(sub.info, sub.b64info or "", "info"),
        _embedded(sub.data, sub.b64data or "", "data"),
        _read_override(sub.override),
    )


def _read_override(override: dict[str, Raw] | None) -> dict[str, bool]:
    known = {name: _decode(raw, _OVERRIDE, name) for name, raw in (override or {}).items() if name in OVERRIDABLE}
    return {name: bool(option.value) for name, option in known.items() if option is not None}


def _embedded(raw: Raw | UnsetType, encoded: str, name: str) -> bytes:
    """Return the JSON text of a claim, or the bytes of its base64 form, which has precedence; see `text_or_bytes`."""
    try:
        if encoded:
            return text_or_bytes(decode_base64(encoded))
        return payload(raw) if raw is not UNSET and bytes(raw) != b"null" else b""
    except ClientError:
        raise TokenInvalid(f"{name} is not valid JSON text") from None
    except ValueError:
        raise TokenInvalid(f"b64{name} is not base64") from None
