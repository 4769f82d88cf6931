"""The table [engine.redis]: its rules, its variables, and its secrets."""

from __future__ import annotations

import importlib.util

import pytest

from realtime.config.redis_settings import addresses_in_use
from realtime.config.settings import Settings
from realtime.config.sources import parse
from tests.config.parsing import parse_file, problem

REFUSED = [
    ("sentinel_address = 'a:26379'", "engine.redis.sentinel_master_name: Sentinels need the name of the server"),
    ("address = 'redis+sentinel://a:26379'", "engine.redis.sentinel_master_name: Sentinels need the name"),
    ("cluster_address = 'a:1'\ndb = 1", "engine.redis.db: a Cluster has the database 0 only; remove this key"),
    ("address = ['a:1', 'redis://a:1/2']", "engine.redis.address: two entries name the same server; remove one"),
    ("tls.cert_pem = 'x'", "engine.redis.tls.cert_pem: cert_pem and key_pem belong together"),
    ("prefix = 'a{b'", "engine.redis.prefix: expected a name of letters, digits"),
    ("prefix = ''", "engine.redis.prefix: expected a name of letters, digits"),
    ("address = []", "engine.redis.address: expected a list of addresses"),
    ("client_name = 'a b'", "engine.redis.client_name: expected a name without spaces"),
    ("io_timeout = '0s'", "engine.redis.io_timeout: expected a duration"),
    ("history_use_lists = true", "engine.redis.history_use_lists: a Centrifugo key that realtime does not support yet"),
    ("tls.client_ca_pem = 'x'", "engine.redis.tls.client_ca_pem: a Centrifugo key that realtime does not support"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text for text, _ in REFUSED])
def test_a_mistake_is_one_line_with_the_remedy(text: str, message: str) -> None:
    assert message in problem(f"[engine.redis]\n{text}")


def test_redis_without_its_library_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "hiredis" else find(name))
    assert problem("[engine]\ntype = 'redis'") == (
        'realtime.toml:2: engine.type: "redis" needs the library hiredis; install it with: '
        "pip install 'twisted-realtime[redis]'"
    )
    parse_file("[engine]\ntype = 'memory'")


def test_sentinels_may_name_several_shards() -> None:
    entries = [f"redis+sentinel://a:1?sentinel_master_name={name}" for name in ("m1", "m2")]
    redis = parse_file(f"engine.redis.address = {entries}").engine.redis
    assert [address.sentinel_master_name for address in addresses_in_use(redis)] == ["m1", "m2"]


def test_variables_set_the_keys() -> None:
    environ = {
        "REALTIME_ENGINE_REDIS_ADDRESS": "redis://a:1 redis://b:1",
        "REALTIME_ENGINE_REDIS_TLS_ENABLED": "true",
        "REALTIME_ENGINE_REDIS_PRESENCE_TTL": "30s",
    }
    redis = parse({}, None, environ).engine.redis
    assert (redis.address, redis.tls.enabled, redis.presence_ttl) == (("redis://a:1", "redis://b:1"), True, 30.0)


def test_no_representation_has_a_credential() -> None:
    text = "address = 'redis://:hidden@h:1'\npassword = 'hidden'\nsentinel_password = 'hidden'\n"
    settings: Settings = parse_file(f"[engine.redis]\n{text}tls = {{ cert_pem = 'x', key_pem = 'hidden' }}")
    assert "hidden" not in repr(settings) + repr(addresses_in_use(settings.engine.redis))
