"""The servers that the tests of the Redis engine start."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.redis.deployments import PASSWORD, USER, USERS, RedisProcess, RedisStarter


def test_a_server_comes_back_with_its_data(redis_starter: RedisStarter) -> None:
    server = redis_starter.standalone(aof=True)
    server.command("SET", "kept", "1")
    server.restart()
    assert server.command("GET", "kept") == "1"


def test_the_documented_user_has_no_rights_beyond_its_prefix(redis_server: RedisProcess) -> None:
    client = redis_server.connect(username=USER, password=PASSWORD)
    assert client.set("realtime.x", 1)
    denied = redis_server.command("ACL", "DRYRUN", USER, "SET", "other", "1")
    assert "no permissions to access the 'other' key" in denied


def test_the_documentation_has_the_rights_of_the_tests() -> None:
    page = (Path(__file__).parents[2] / "docs/redis.md").read_text()
    assert USERS[0].replace(PASSWORD, "PASSWORD") in page.splitlines()


def test_all_servers_are_ended_with_their_starter() -> None:
    starter = RedisStarter()
    server = starter.standalone()
    starter.finish()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    assert not starter.folder.exists()
