"""Cookies of requests and responses (RFC 6265)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

SameSite = Literal["Strict", "Lax", "None"]

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# RFC 6265 section 4.1.1: visible ASCII without quotes, comma, semicolon and backslash.
_VALUE = re.compile(r"[!#-+\--:<-\[\]-~]*")
_ATTRIBUTE = re.compile(r"[ -:<-~]*")


def parse_cookies(header: str) -> dict[str, str]:
    """Return the values in a Cookie header by name, as sent, without surrounding quotes.

    What has no name that is a token is left out. Of two values of one name the first counts: a browser sends the cookie
    with the longer path first (RFC 6265 section 5.4).
    """
    cookies: dict[str, str] = {}
    for pair in header.split(";"):
        name, equals, value = pair.partition("=")
        name, value = name.strip(" \t"), value.strip(" \t")
        if not equals or _TOKEN.fullmatch(name) is None:
            continue
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        cookies.setdefault(name, value)
    return cookies


@dataclass(frozen=True, slots=True)
class Cookie:
    """A cookie that a response sets. Raises ValueError for what a browser would refuse or read in another way.

    value: visible ASCII without quotes, commas, semicolons and backslashes; encode any other value, for example with
    `urllib.parse.quote`. max_age: seconds; None until the browser ends, 0 to delete the cookie (with the path and the
    domain that it was set with). domain: "" for this host alone. secure: by HTTPS alone; set it wherever your site has
    HTTPS. http_only: scripts of the page can't read it. same_site: "Lax" keeps it out of requests that pages of other
    sites make, except links; "None" needs `secure`.
    """

    name: str
    value: str
    max_age: int | None = None
    path: str = "/"
    domain: str = ""
    secure: bool = False
    http_only: bool = True
    same_site: SameSite = "Lax"

    def __post_init__(self) -> None:
        if _TOKEN.fullmatch(self.name) is None:
            raise ValueError(f"{self.name!r} is no name of a cookie; use letters, digits, hyphens and underscores")
        if _VALUE.fullmatch(self.value) is None:
            raise ValueError(f"the value of the cookie {self.name} has other characters than a cookie may; encode it")
        for attribute, text in (("path", self.path), ("domain", self.domain)):
            if _ATTRIBUTE.fullmatch(text) is None:
                raise ValueError(f"the {attribute} of the cookie {self.name} has other characters than a cookie may")
        if self.same_site not in ("Strict", "Lax", "None"):
            raise ValueError(f'the cookie {self.name} has same_site={self.same_site!r}; use "Strict", "Lax" or "None"')
        if not self.secure and (self.same_site == "None" or self.name.startswith(("__Secure-", "__Host-"))):
            raise ValueError(f"browsers refuse the cookie {self.name} without secure=True")
        if self.name.startswith("__Host-") and (self.domain or self.path != "/"):
            raise ValueError(f'browsers refuse the cookie {self.name} with a domain, or a path other than "/"')

    def header(self) -> tuple[str, str]:
        """Return the header that sets the cookie, as (name, value)."""
        parts = [f"{self.name}={self.value}"]
        parts += [f"{name}={text}" for name, text in (("Path", self.path), ("Domain", self.domain)) if text]
        if self.max_age is not None:
            parts.append(f"Max-Age={int(self.max_age)}")
        parts += [name for name, is_set in (("Secure", self.secure), ("HttpOnly", self.http_only)) if is_set]
        return "Set-Cookie", "; ".join((*parts, f"SameSite={self.same_site}"))
