"""The keys of tokens: secrets, public keys, and sets of keys that an identity provider publishes (RFC 7517).

A key verifies by the algorithms of its own family alone, regardless of a token's header (RFC 8725 section 3.1).
`KeySets` caches fetched key sets; `realtime.worker.key_sets` fetches them over HTTP.
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

# The most bytes of a key set, keys read from it, and characters of a key id.
MAX_SET_BYTES = 256 * 1024
MAX_KEYS = 100
MAX_KID = 255
# Bits of an RSA key. RFC 7518 section 3.3 has the minimum; larger keys than OpenSSL accepts would be slow.
RSA_BITS = range(2048, 16384 + 1)

# Seconds that fetched keys are valid for, and seconds between two attempts to fetch the same set.
LIFETIME = 3600.0
RETRY_INTERVAL = 10.0
# In this many last seconds of its lifetime a set is renewed while it still serves. So no client waits for a renewal,
# and a shorter outage of the provider has no effect.
RENEWAL_WINDOW = 600.0

_SIGNATURES = {name: algorithm for name, algorithm in get_default_algorithms().items() if name != "none"}
_HMAC = ("HS256", "HS384", "HS512")
_RSA = ("RS256", "RS384", "RS512")
_PSS = ("PS256", "PS384", "PS512")
# RFC 7518 section 3.4 assigns a curve to each algorithm.
_CURVES = {"secp256r1": ("ES256",), "secp384r1": ("ES384",), "secp521r1": ("ES512",)}
# The algorithms of keys in a key set.
PUBLISHED = frozenset((*_RSA, *_PSS, "ES256", "ES384", "ES512", "EdDSA"))


class VerificationKey(Struct, frozen=True):
    """A key for verifying signatures. algorithms: the names of its family's algorithms, as in a token's header."""

    algorithms: tuple[str, ...]
    material: Any

    def verifies(self, algorithm: str, signed: bytes, signature: bytes) -> bool:
        """Return whether `signature` signs `signed`, by an algorithm of this key."""
        return algorithm in self.algorithms and bool(_SIGNATURES[algorithm].verify(signed, self.material, signature))

    def __repr__(self) -> str:  # keeps secrets out of logs
        return f"VerificationKey({self.algorithms}, ...)"


def secret_key(text: str) -> VerificationKey:
    """Return an HMAC key from a secret shared with the signer."""
    return VerificationKey(_HMAC, text.encode())


def public_key(pem: str) -> VerificationKey:
    """Return an RSA or elliptic curve key from PEM text. Raises ValueError for any other text or key."""
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
    raise ValueError("the key is neither RSA of 2048 to 16384 bits nor on one of the curves P-256, P-384, P-521")


# -- key sets ---------------------------------------------------------------------------------------------------------

# The longest number of a key in base64url is an RSA modulus.
_Number = Annotated[str, Meta(max_length=-(-RSA_BITS[-1] // 6))]


class _WebKey(Struct, frozen=True):
    """The public part of a JSON Web Key. Other members, such as private parts and `x5u`, are never read."""

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
    """Return the signature keys of a JSON Web Key Set by key id. Raises KeysUnavailable if `text` is not a key set.

    Malformed keys and keys of other kinds or uses are skipped (RFC 7517 section 5), and so are keys after the first
    MAX_KEYS. Of two keys with the same id, the first counts.
    """
    if len(text) > MAX_SET_BYTES:
        raise KeysUnavailable(f"the key set exceeds {MAX_SET_BYTES} bytes")
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
    """Raises the errors of the cryptographic libraries for an unusable key: ValueError, TypeError, PyJWTError etc."""
    numbers = {name: getattr(described, name) for name in ("kty", "n", "e", "crv", "x", "y")}
    if described.kty == "OKP":
        if described.crv != "Ed25519" or described.alg not in ("", "EdDSA"):
            raise ValueError("not an Ed25519 signature key")
        return VerificationKey(("EdDSA",), _SIGNATURES["EdDSA"].from_jwk(numbers))
    material = _SIGNATURES["RS256" if described.kty == "RSA" else "ES256"].from_jwk(numbers)
    family = _family(material)
    if not described.alg:
        return VerificationKey(family, material)
    # A set may restrict a key to one algorithm. An RSA key verifies PSS only with such a restriction.
    if described.alg not in (family + _PSS if family == _RSA else family):
        raise ValueError("the algorithm is not one of the key's family")
    return VerificationKey((described.alg,), material)


class KeySource(Protocol):
    """A source of published keys."""

    async def key(self, endpoint: str, kid: str) -> VerificationKey | None:
        """Return the key of this id in the set at `endpoint`, or None. Raises KeysUnavailable."""


class _CachedSet:
    """The cached set of one endpoint. fetched, tried: the times of the last successful fetch and of the last attempt.

    fetch: the latest fetch, whose result is whether it succeeded. fetching: whether it is still running.
    """

    __slots__ = ("fetch", "fetched", "fetching", "keys", "tried")

    def __init__(self) -> None:
        self.keys: Mapping[str, VerificationKey] = {}
        self.fetched = self.tried = -math.inf
        self.fetch: Awaitable[bool] | None = None
        self.fetching = False


class KeySets:
    """A cache of key sets by endpoint. Endpoints come from the configuration, so they are few.

    A set serves for LIFETIME. It is fetched again towards the end of LIFETIME, and when a token names an unknown key:
    at most every RETRY_INTERVAL seconds, and once for all waiting callers. While fetching fails, the cached keys serve
    on to the end of their lifetime.
    """

    def __init__(
        self,
        fetch: Callable[[str], Coroutine[Any, Any, Mapping[str, VerificationKey]]],
        start: Callable[[Coroutine[Any, Any, bool]], Awaitable[bool]],
        clock: Callable[[], float],
    ) -> None:
        """fetch: returns the keys at an endpoint by id, or raises KeysUnavailable within a few seconds.

        start: starts a coroutine and returns an awaitable for any number of callers. clock: monotonic seconds.
        """
        self._fetch = fetch
        self._start = start
        self._clock = clock
        self._sets: dict[str, _CachedSet] = {}

    async def key(self, endpoint: str, kid: str) -> VerificationKey | None:
        """See KeySource. None is the provider's own answer, not older than the call or RETRY_INTERVAL."""
        cached = self._sets.setdefault(endpoint, _CachedSet())
        age = self._clock() - cached.fetched
        found = cached.keys.get(kid) if age < LIFETIME else None
        running = self._fetch_if_due(endpoint, cached) if found is None or age >= LIFETIME - RENEWAL_WINDOW else None
        if found is not None:
            return found
        if running is None:
            raise KeysUnavailable("the key set was fetched a moment ago and has no such key")
        if not await running:
            raise KeysUnavailable("fetching the key set failed")
        return cached.keys.get(kid)

    def _fetch_if_due(self, endpoint: str, cached: _CachedSet) -> Awaitable[bool] | None:
        """Return the running fetch, or start one; None if the last attempt was less than RETRY_INTERVAL seconds ago."""
        now = self._clock()
        if not cached.fetching:
            if now < cached.tried + RETRY_INTERVAL:
                return None
            cached.tried, cached.fetching = now, True
            cached.fetch = self._start(self._run_fetch(endpoint, cached))
        return cached.fetch

    async def _run_fetch(self, endpoint: str, cached: _CachedSet) -> bool:
        try:
            cached.keys = await self._fetch(endpoint)
        except KeysUnavailable:
            return False
        finally:
            cached.fetching = False
        cached.fetched = self._clock()
        return True


# The assigned global unicast addresses (RFC 4291 section 2.4), and IPv4 behind a translator (RFC 6052 section 2.1).
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public Internet: not to this host, a private or a reserved network.

    An IPv6 address that embeds an IPv4 address counts as that address.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(ip) % 2**32) if ip in _TRANSLATED else None
        ip = ip.ipv4_mapped or ip.sixtofour or translated or ip
    return ip.is_global and not ip.is_multicast and (ip.version == 4 or ip in _GLOBAL_UNICAST)
