"""The keys of tokens: secrets, public keys, and sets of keys that an identity provider publishes (RFC 7517).

A key knows the algorithms of its family, and verifies by no other, whatever a token says of itself (RFC 8725
section 3.1). `KeySets` keeps the sets that were fetched; how they are fetched, and by which clock, is the shell's.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Annotated, Any, Protocol

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import get_default_algorithms
from msgspec import Meta, Struct

from realtime.errors import KeysUnavailable

# Bytes of a key set, keys that are read of it, and characters of a key's id.
MAX_SET_BYTES = 256 * 1024
MAX_KEYS = 100
MAX_KID = 255
# Bits of an RSA key. RFC 7518 section 3.3 has the least; OpenSSL takes no more to be fast.
RSA_BITS = range(2048, 16384 + 1)

# Seconds that fetched keys are good for, and between two attempts to fetch the same set.
LIFETIME = 3600.0
RETRY = 10.0
# In the last of these seconds a set is renewed while it still serves, so that nobody has to wait for it, and an outage
# of the provider that is shorter is not noticed.
AHEAD = 600.0

_SIGNATURES = {name: algorithm for name, algorithm in get_default_algorithms().items() if name != "none"}
_HMAC = ("HS256", "HS384", "HS512")
_RSA = ("RS256", "RS384", "RS512")
_PSS = ("PS256", "PS384", "PS512")
# RFC 7518 section 3.4: each algorithm has its curve.
_CURVES = {"secp256r1": ("ES256",), "secp384r1": ("ES384",), "secp521r1": ("ES512",)}
# The algorithms of the keys that a set may hold.
PUBLISHED = frozenset((*_RSA, *_PSS, "ES256", "ES384", "ES512", "EdDSA"))


class VerificationKey(Struct, frozen=True):
    """What verifies signatures. algorithms: those of its family, by their names in a token's header."""

    algorithms: tuple[str, ...]
    material: Any

    def verifies(self, algorithm: str, signed: bytes, signature: bytes) -> bool:
        """Whether `signature` is that of `signed`, by an algorithm that this key is for."""
        return algorithm in self.algorithms and bool(_SIGNATURES[algorithm].verify(signed, self.material, signature))

    def __repr__(self) -> str:  # keeps secrets out of logs
        return f"Key({self.algorithms}, ...)"


def secret_key(text: str) -> VerificationKey:
    """The key that is shared with those who sign (HMAC)."""
    return VerificationKey(_HMAC, text.encode())


def public_key(pem: str) -> VerificationKey:
    """An RSA or elliptic curve key from PEM text. Raises ValueError for any other text or key."""
    try:
        material = load_pem_public_key(pem.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    return VerificationKey(_family(material), material)


def _family(material: object) -> tuple[str, ...]:
    if isinstance(material, RSAPublicKey) and material.key_size in RSA_BITS:
        return _RSA
    if isinstance(material, EllipticCurvePublicKey) and material.curve.name in _CURVES:
        return _CURVES[material.curve.name]
    raise ValueError("a key of another kind, or a short one")


# -- key sets ---------------------------------------------------------------------------------------------------------

# The longest number of a key in base64url: an RSA modulus.
_Number = Annotated[str, Meta(max_length=-(-RSA_BITS[-1] // 6))]


class _WebKey(Struct, frozen=True):
    """A JSON Web Key, as far as it is public. What else it says (private parts, `x5u`) is not even read."""

    kty: str
    kid: Annotated[str, Meta(min_length=1, max_length=MAX_KID)]
    use: str
    alg: str = ""
    n: _Number = ""
    e: _Number = ""
    crv: str = ""
    x: _Number = ""
    y: _Number = ""


class _WebKeySet(Struct, frozen=True):
    keys: list[msgspec.Raw]


def key_set(text: bytes) -> dict[str, VerificationKey]:
    """The keys of a JSON Web Key Set that sign tokens, by their ids. Raises KeysUnavailable when it is none.

    Keys of other kinds or uses, and broken ones, are passed over (RFC 7517 section 5), and so is what follows the
    first MAX_KEYS. Of two keys with the same id the first counts.
    """
    if len(text) > MAX_SET_BYTES:
        raise KeysUnavailable(f"a key set of more than {MAX_SET_BYTES} bytes")
    try:
        entries = msgspec.json.decode(text, type=_WebKeySet).keys
    except (ValueError, RecursionError):
        raise KeysUnavailable("not a JSON Web Key Set") from None
    keys: dict[str, VerificationKey] = {}
    for entry in entries[:MAX_KEYS]:
        try:
            described = msgspec.json.decode(entry, type=_WebKey)
            key = _web_key(described)
        except (ValueError, TypeError, RecursionError, jwt.PyJWTError, UnsupportedAlgorithm):
            continue
        if described.use == "sig":
            keys.setdefault(described.kid, key)
    return keys


def _web_key(described: _WebKey) -> VerificationKey:
    """Raises what its libraries raise for a key that can't be used: ValueError, TypeError, PyJWTError and so on."""
    numbers = {name: getattr(described, name) for name in ("kty", "n", "e", "crv", "x", "y")}
    if described.kty == "OKP":
        if described.crv != "Ed25519" or described.alg not in ("", "EdDSA"):
            raise ValueError("of another kind")
        return VerificationKey(("EdDSA",), _SIGNATURES["EdDSA"].from_jwk(numbers))
    material = _SIGNATURES["RS256" if described.kty == "RSA" else "ES256"].from_jwk(numbers)
    family = _family(material)
    if not described.alg:
        return VerificationKey(family, material)
    # The set may bind a key to one algorithm, and an RSA key to PSS only so.
    if described.alg not in (family + _PSS if family == _RSA else family):
        raise ValueError("of another algorithm")
    return VerificationKey((described.alg,), material)


class KeySource(Protocol):
    """Where the keys of key sets come from."""

    async def key(self, endpoint: str, kid: str) -> VerificationKey | None:
        """The key of this id in the set at `endpoint`; None when it has none. Raises KeysUnavailable."""


class _Kept:
    """The set of one endpoint. fetched, tried: when it was had, and when it was last asked for.

    flight: the latest fetch, which is under way while `flying`; it comes to whether it succeeded.
    """

    __slots__ = ("fetched", "flight", "flying", "keys", "tried")

    def __init__(self) -> None:
        self.keys: Mapping[str, VerificationKey] = {}
        self.fetched = self.tried = -math.inf
        self.flight: Awaitable[bool] | None = None
        self.flying = False


class KeySets:
    """Key sets by endpoint, each with its keys by id. Endpoints come from the configuration, so they are few.

    A set serves for LIFETIME. It is fetched anew towards the end of that and when a token names a key that it has not,
    but never more often than every RETRY seconds, and once for all who wait. While that fails, the keys that are there
    serve on to the end of their time.
    """

    def __init__(
        self,
        fetch: Callable[[str], Coroutine[Any, Any, Mapping[str, VerificationKey]]],
        start: Callable[[Coroutine[Any, Any, bool]], Awaitable[bool]],
        clock: Callable[[], float],
    ) -> None:
        """fetch: has the keys at an endpoint, by id; raises KeysUnavailable within a few seconds.

        start: starts a coroutine; any number of callers may await what it returns. clock: seconds, never set back.
        """
        self._fetch = fetch
        self._start = start
        self._clock = clock
        self._sets: dict[str, _Kept] = {}

    async def key(self, endpoint: str, kid: str) -> VerificationKey | None:
        """See KeySource. None is an answer of the provider: it was asked after the token had come, or just then."""
        kept = self._sets.setdefault(endpoint, _Kept())
        age = self._clock() - kept.fetched
        found = kept.keys.get(kid) if age < LIFETIME else None
        flight = self._renewal(endpoint, kept) if found is None or age >= LIFETIME - AHEAD else None
        if found is not None:
            return found
        if flight is None:
            raise KeysUnavailable("the key set was asked for a moment ago")
        if not await flight:
            raise KeysUnavailable("the key set can't be had")
        return kept.keys.get(kid)

    def _renewal(self, endpoint: str, kept: _Kept) -> Awaitable[bool] | None:
        """The fetch that is under way, or a new one; None when the last one was a moment ago."""
        now = self._clock()
        if not kept.flying:
            if now < kept.tried + RETRY:
                return None
            kept.tried, kept.flying = now, True
            kept.flight = self._start(self._fly(endpoint, kept))
        return kept.flight

    async def _fly(self, endpoint: str, kept: _Kept) -> bool:
        try:
            kept.keys = await self._fetch(endpoint)
        except KeysUnavailable:
            return False
        finally:
            kept.flying = False
        kept.fetched = self._clock()
        return True


# What the registries give out (RFC 4291 section 2.4), and IPv4 behind a translator (RFC 6052 section 2.1).
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet: not of this host, of a private network or reserved.

    An IPv6 address that leads to an IPv4 one is judged by that.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(ip) % 2**32) if ip in _TRANSLATED else None
        ip = ip.ipv4_mapped or ip.sixtofour or translated or ip
    return ip.is_global and not ip.is_multicast and (ip.version == 4 or ip in _GLOBAL_UNICAST)
