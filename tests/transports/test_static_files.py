"""Static files over real sockets: content, ranges, and paths outside the directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import globalLogPublisher

from tests.driving import on_loop
from tests.transports.http_site import Site, fetch, site_for_test, status_of


@pytest.fixture
def site() -> Iterator[Site]:
    with site_for_test() as site:
        yield site


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "public"
    (root / "sub").mkdir(parents=True)
    (root / "index.html").write_text("<p>hello")
    (root / "sub" / "index.html").write_text("below")
    (root / "app.js").write_text("let a = 1")
    (root / "with space.txt").write_text("spaced")
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / ".env").write_text("hidden")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    return root


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/", b"<p>hello", "text/html; charset=utf-8"),
        ("/index.html", b"<p>hello", "text/html; charset=utf-8"),
        ("/sub/", b"below", "text/html; charset=utf-8"),
        ("/app.js", b"let a = 1", "text/javascript"),
        ("/with%20space.txt", b"spaced", "text/plain; charset=utf-8"),
        ("/picture.png", b"\x89PNG", "image/png"),
    ],
)
@on_loop
async def test_files_are_served(site: Site, files: Path, path: str, body: bytes, kind: str) -> None:
    site.app.http.static("/", files)
    url = await site.start()
    answer = await fetch("GET", url + path)
    assert (answer.status_code, answer.content) == (200, body)
    assert answer.headers["Content-Type"].replace("application/javascript", "text/javascript").startswith(kind)
    assert answer.headers["Server"] == "realtime"
    head = await fetch("HEAD", url + path)
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(body)))
    again = await fetch("GET", url + path, headers={"If-Modified-Since": answer.headers["Last-Modified"]})
    assert (again.status_code, again.content) == (304, b"")
    part = await fetch("GET", url + path, headers={"Range": "bytes=1-2"})
    assert (part.status_code, part.content) == (206, body[1:3])


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [("bytes=2-", 206, b"log()"[2:]), ("bytes=-3", 206, b"g()"), ("bytes=0-99", 206, b"log()"), ("bytes=9-", 416, b"")],
)
@on_loop
async def test_a_part_of_a_file(site: Site, files: Path, asked: str, status: int, content: bytes) -> None:
    (files / "part.txt").write_bytes(b"log()")
    site.app.http.static("/", files)
    url = await site.start()
    answer = await fetch("GET", url + "/part.txt", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (status, content)


STRANGE = [
    *(
        b"Range: bytes=" + value
        for value in (b"0-" + b",0-" * 1000, b"0-0," * 1000 + b"0-0", b"-0", b"5-1", b"\xff-", b"a-b")
    ),
    *(
        b"Range: bytes=" + value
        for value in (b"9" * 5000 + b"-", b"-" + b"9" * 5000, b"", b"-", b"0-1\r\nRange: bytes=1-2")
    ),
    *(
        b"If-Modified-Since: " + value
        for value in (b";", b"\xff", b"Sun, 22 Nov " + b"9" * 5000 + b" 08:00:00 GMT", b"x")
    ),
]


@pytest.mark.parametrize("line", STRANGE, ids=[line[:40] for line in STRANGE])
@on_loop
async def test_unusual_range_and_date_headers_are_ignored_and_not_logged(site: Site, files: Path, line: bytes) -> None:
    site.app.http.static("/", files)
    await site.start()
    events: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(events.append)
    try:
        answer = await site.raw(b"GET /picture.png HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + line + b"\r\n\r\n")
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert status_of(answer) == 200
    assert answer.endswith(b"\r\n\r\n\x89PNG")
    assert not events


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/sub/../../secret.txt",
        "/sub/%2e%2e/app.js",
        "//etc/passwd",
        "/./app.js",
        "/app.js/",
        "/app.js%00.html",
        "/..%5csecret.txt",
        "/.env",
        "/.git/config",
        "/%2egit/config",
        "/link.txt",
        "/%ff",
        "/sub",
        "/missing",
        "/" + "a" * 1000,
    ],
)
@on_loop
async def test_no_file_outside_the_directory_and_no_hidden_file_is_served(site: Site, files: Path, path: str) -> None:
    site.app.http.static("/", files)
    await site.start()
    answer = await site.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert status_of(answer) == 404
    assert b"secret" not in answer
    assert b"hidden" not in answer


@on_loop
async def test_a_route_precedes_files_and_the_longest_prefix_wins(site: Site, files: Path) -> None:
    site.app.http.static("/", files)
    site.app.http.static("/deep", files / "sub")

    @site.app.http.get("/app.js")
    async def script(request: Any) -> Any:
        return "made"

    url = await site.start()
    assert (await fetch("GET", f"{url}/deep/index.html")).text == "below"
    assert (await fetch("GET", f"{url}/app.js")).text == "made"
    assert (await fetch("GET", f"{url}/deep")).url == f"{url}/deep/"
    answer = await fetch("POST", f"{url}/deep/index.html")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")
