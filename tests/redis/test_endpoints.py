"""How a server is entered: TLS, unix sockets, users, databases, names of connections."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import trustme
from twisted.logger import capturedLogs

from realtime.config.redis_settings import RedisTLSSettings
from realtime.config.settings import RedisSettings
from tests.redis.deployments import PASSWORD, USER, RedisProcess, RedisStarter
from tests.redis.users import User
from tests.system.brokers import until


async def connected(**settings: Any) -> User:
    """A user whose server is ready."""
    user = User(RedisSettings(**settings))
    await user.ready()
    return user


async def refusal(**settings: Any) -> str:
    """Why a server does not let us in, as the log says it."""
    with capturedLogs() as events:
        user = User(RedisSettings(**settings))
        try:
            await until(lambda: any("reason" in event for event in events))
            assert user.value("realtime_redis_away") == 1
        finally:
            await user.close()
    return str(next(event["reason"] for event in events if "reason" in event))


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_user_database_and_name_are_used(redis_server: RedisProcess) -> None:
    user = await connected(
        address=(f"unix://{USER}:{PASSWORD}@{redis_server.path}",), user="unused", db=3, client_name="node-1"
    )
    try:
        await user.call("SET", "realtime.x", "1")
        assert redis_server.connect(db=3).get("realtime.x") == b"1"
        [client] = [each for each in redis_server.client.client_list() if each["name"] == "node-1"]
        assert (client["user"], client["db"], client["resp"]) == (USER, "3", "3")
    finally:
        await user.close()


def tls_of(server: RedisProcess, **more: Any) -> RedisTLSSettings:
    assert server.tls is not None
    known = {"server_ca_pem": str(server.tls.authority), "cert_pem": str(server.tls.client)}
    return RedisTLSSettings(**known | {"key_pem": str(server.tls.client)} | more)


@pytest_twisted.ensureDeferred
async def test_tls_checks_the_server_and_presents_a_certificate(redis_starter: RedisStarter) -> None:
    server = redis_starter.standalone(tls=True)
    text = Path(str(server.tls and server.tls.authority)).read_text()
    for tls in (
        tls_of(server),
        tls_of(server, server_ca_pem=text, server_name="redis.test"),
        tls_of(server, server_ca_pem=base64.b64encode(text.encode()).decode()),
    ):
        user = await connected(address=(f"rediss://{server.address}",), tls=tls)
        assert await user.call("PING") == b"PONG"
        await user.close()
    address = (server.address,)
    stranger = trustme.CA().cert_pem.bytes().decode()
    assert "engine.redis.tls.server_ca_pem: its authority has not signed" in await refusal(
        address=address, tls=tls_of(server, enabled=True, server_ca_pem=stranger)
    )
    assert "engine.redis.tls.server_name: the server's certificate has another name" in await refusal(
        address=address, tls=tls_of(server, enabled=True, server_name="other.test")
    )
    assert "engine.redis.tls.key_pem: not the private key of cert_pem" in await refusal(
        address=address, tls=tls_of(server, enabled=True, key_pem=trustme.CA().private_key_pem.bytes().decode())
    )
    assert "connection" in await refusal(address=address)


@pytest.mark.parametrize(
    ("options", "settings", "expected"),
    [
        ({"requirepass": "p"}, {}, "engine.redis.password: the server wants a password; set it"),
        ({"requirepass": "p"}, {"password": "q"}, "engine.redis.password: wrong, or the user does not exist"),
        ({}, {"user": "joe", "password": "q"}, "engine.redis.password: wrong, or the user does not exist"),
        ({}, {"db": 99}, "engine.redis.db: ERR DB index is out of range; choose a smaller number"),
        ({"user": "user joe on >p ~* &* +@all -info"}, {"user": "joe", "password": "p"}, "engine.redis.user: "),
        ({"maxclients": "1"}, {}, "max number of clients reached; raise maxclients"),
        ({"replicaof": "127.0.0.1 1"}, {}, "it is a replica; name its master, or the Sentinels"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_refusal_names_the_key_to_correct(
    redis_starter: RedisStarter, options: dict[str, str], settings: dict[str, Any], expected: str
) -> None:
    server = redis_starter.standalone(**options)
    server.command("PING")  # one connection more
    assert expected in await refusal(address=(server.address,), **settings)


@pytest_twisted.ensureDeferred
async def test_credentials_of_sentinels_and_servers_differ(redis_starter: RedisStarter) -> None:
    watched = redis_starter.sentinels(replicas=0, sentinels=1, requirepass="p1", sentinel_password="p2", tls=True)
    user = await connected(
        sentinel_address=(watched.addresses,),
        sentinel_master_name=watched.name,
        sentinel_client_name="asker",
        sentinel_tls=tls_of(watched.servers[0], enabled=True),
        tls=tls_of(watched.servers[0], enabled=True),
        password="p1",
        sentinel_password="p2",
    )
    try:
        assert await user.call("PING") == b"PONG"
        names = {client["name"] for client in watched.sentinels[0].client.client_list()}
        assert "asker" in names
    finally:
        await user.close()
