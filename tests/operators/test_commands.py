"""Commands by HTTP: who may send them, and the stream of their answers."""

from __future__ import annotations

import pytest

from realtime.operators.commands import HEADER
from tests.operators.test_port import Server, server

__all__ = ["server"]
COMMAND = f"{HEADER}: 1\r\n"


async def test_a_command_answers_with_its_progress_and_its_outcome(server: Server) -> None:
    server.reloads.append("worker 0 has been replaced")
    status, body = await server.get("/reload", method="POST", headers=COMMAND)
    lines = [line for line in body.splitlines() if line.startswith("{")]  # without the sizes of the chunks
    assert (status, lines) == (
        200,
        ['{"line":"worker 0 has been replaced"}', '{"failure":"no more"}'],
    )


@pytest.mark.parametrize(
    ("method", "headers", "status", "text"),
    [
        ("GET", COMMAND, 405, "only POST; use realtime reload"),
        ("POST", "", 403, f"a command needs the header {HEADER}"),
        ("POST", f"{COMMAND}Origin: http://evil.example\r\n", 403, "a page of another origin"),
        ("POST", f"{COMMAND}Origin: null\r\n", 403, "a page of another origin"),
        ("POST", f"{COMMAND}Sec-Fetch-Site: cross-site\r\n", 403, "a page of another origin"),
        ("OPTIONS", "Access-Control-Request-Method: POST\r\n", 405, "only POST"),
    ],
)
async def test_what_a_page_of_another_origin_can_send_is_no_command(
    server: Server, method: str, headers: str, status: int, text: str
) -> None:
    found, body = await server.get("/reload", method=method, headers=headers)
    assert (found, server.reloads) == (status, [])
    assert text in body
    assert "access-control" not in server.head


async def test_a_command_needs_a_host_of_this_port(server: Server) -> None:
    status, _ = await server.get("/reload", host="evil.example", method="POST", headers=COMMAND)
    assert (status, server.reloads) == (403, [])


async def test_another_number_of_workers(server: Server) -> None:
    server.reloads.append("done")
    _, body = await server.get("/scale?workers=3", method="POST", headers=COMMAND)
    assert '{"line":"3: done"}' in body
    for wrong in ("", "?workers=", "?workers=-1", "?workers=x", "?workers=99999999"):
        _, body = await server.get(f"/scale{wrong}", method="POST", headers=COMMAND)
        assert '{"failure":"no number of workers; use realtime scale N"}' in body
