"""The tables of the settings tree with the keys of tokens: [client.token] and [client.subscription_token]."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from realtime.config import checks
from realtime.config.annotations import NonNegative, Seconds, Secret, about, restricted


class TokenSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Verification of connection tokens (JSON Web Tokens)."""

    hmac_secret_key: Annotated[
        Secret,
        about("Secret of HS256, HS384 and HS512 tokens, 32 bytes or longer. Empty: the server refuses such tokens."),
    ] = ""
    hmac_previous_secret_key: Annotated[
        Secret,
        about("Previous secret, which the server tries second while you change secrets. Empty: no previous secret."),
    ] = ""
    hmac_previous_secret_key_valid_until: Annotated[
        NonNegative,
        about("Unix time, in seconds, from which the server refuses the previous secret. 0: it never expires."),
    ] = 0
    rsa_public_key: Annotated[
        Secret,  # a public key is no secret, but an operator may have put the private key here
        restricted(
            "the PEM text of an RSA public key of 2048 bits or more (-----BEGIN PUBLIC KEY-----)",
            checks.is_rsa_key_or_empty,
        ),
        about("Public key of RS256, RS384 and RS512 tokens, as PEM text. Empty: the server refuses such tokens."),
    ] = ""
    ecdsa_public_key: Annotated[
        Secret,
        restricted(
            "the PEM text of a public key on P-256, P-384 or P-521 (-----BEGIN PUBLIC KEY-----)",
            checks.is_elliptic_key_or_empty,
        ),
        about(
            "Public key of ES256, ES384 or ES512 tokens (its curve decides which), as PEM text. Empty: the server"
            " refuses such tokens."
        ),
    ] = ""
    jwks_public_endpoint: Annotated[
        Secret,  # some URLs contain a password
        restricted('an https address such as "https://id.example.com/jwks.json"', checks.is_key_set_url_or_empty),
        about(
            "URL of a JSON Web Key Set. The server then accepts tokens signed by keys of this set, and ignores the"
            " keys above. Empty: no key set."
        ),
    ] = ""
    jwks_allowed_hosts: Annotated[
        tuple[str, ...],
        restricted(
            'a list of host names or addresses in lower case, without ports, such as ["keys.auth.svc"]',
            checks.are_hosts,
        ),
        about(
            "Hosts in your own network from which the server also fetches the key set over http and from private"
            " addresses."
        ),
    ] = ()
    jwks_allow_insecure: Annotated[
        bool,
        about(
            "The server also fetches the key set over http and from private addresses, from any host. For development"
            " only; name the hosts in jwks_allowed_hosts otherwise."
        ),
    ] = False
    audience: Annotated[str, about("Required value of the `aud` claim. Empty: any value.")] = ""
    audience_regex: Annotated[
        str,
        restricted("a regular expression that Python compiles", checks.is_regular_expression),
        about(
            "Regular expression that must match an `aud` claim. jwks_public_endpoint may contain its named groups as"
            " {{group}}. Empty: any value."
        ),
    ] = ""
    issuer: Annotated[str, about("Required value of the `iss` claim. Empty: any value.")] = ""
    issuer_regex: Annotated[
        str,
        restricted("a regular expression that Python compiles", checks.is_regular_expression),
        about(
            "Regular expression that must match the `iss` claim. jwks_public_endpoint may contain its named groups as"
            " {{group}}. Empty: any value."
        ),
    ] = ""
    user_id_claim: Annotated[
        str,
        restricted("a name of letters and _", checks.is_claim_name_or_empty),
        about("Name of the claim that contains the user ID. Empty: `sub`."),
    ] = ""
    leeway: Annotated[
        Seconds,
        about("Time by which an issuer's clock may be ahead: the server accepts a token so long before its `nbf`."),
    ] = 5.0
    max_length: Annotated[NonNegative, about("Maximum length of a token, in bytes. 0: no limit.")] = 8192

    def __repr__(self) -> str:
        """Return no values: keys must not get into logs."""
        return f"{type(self).__name__}(...)"


class SubscriptionTokenSettings(TokenSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Verification of subscription tokens. This table inherits nothing from [client.token]."""

    enabled: Annotated[
        bool,
        about("The server verifies subscription tokens by this table. false: it verifies them by [client.token]."),
    ] = False
