"""The page's files and the policy of the page."""

from __future__ import annotations

import re

from realtime.operators import page


def test_every_file_that_the_page_names_is_served() -> None:
    files = page.load()
    html = files[b"/"][1].decode()
    names = re.findall(r'(?:href|src)="(?!data:)([^"]+)"', html)
    assert {f"/{name}".encode() for name in names} == set(files) - {b"/"}


def test_the_policy_allows_only_the_pages_own_script_and_fetches_from_this_port() -> None:
    policy = dict(part.strip().split(" ", 1) for part in page.HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert (policy["script-src"], policy["style-src"], policy["connect-src"]) == ("'self'", "'self'", "'self'")
    assert policy["frame-ancestors"] == "'none'"


def test_the_page_has_no_inline_script_or_style() -> None:
    html = page.load()[b"/"][1].decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", html)
