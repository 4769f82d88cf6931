"""Addresses of Redis servers: every form, and one line with the remedy for every mistake."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.config.redis_addresses import RedisAddress, parse_address, parse_list
from realtime.config.redis_settings import addresses_in_use
from realtime.config.values import ValueRefused
from tests.config.parsing import parse_file, problem

FORMS = [
    ("redis.svc:6379", RedisAddress(topology="server", hosts=(("redis.svc", 6379),))),
    ("[::1]:6379", RedisAddress(topology="server", hosts=(("::1", 6379),))),
    (
        "tcp://joe:p%40ss@10.0.0.1:7000/3",
        RedisAddress(topology="server", hosts=(("10.0.0.1", 7000),), user="joe", password="p@ss", db=3),
    ),
    ("redis://:a:b@h:1", RedisAddress(topology="server", hosts=(("h", 1),), password="a:b")),
    ("rediss://h:1?tls_enabled=false", RedisAddress(topology="server", hosts=(("h", 1),), tls=True)),
    ("redis://h:1?tls_enabled=true", RedisAddress(topology="server", hosts=(("h", 1),), tls=True)),
    (
        "redis://h:1/0?connect_timeout=300ms&io_timeout=2s",
        RedisAddress(topology="server", hosts=(("h", 1),), db=0, connect_timeout=0.3, io_timeout=2.0),
    ),
    ("unix:///run/redis.sock", RedisAddress(topology="server", path="/run/redis.sock")),
    (
        "unix://joe:secret@/run/a%20b",
        RedisAddress(topology="server", path="/run/a b", user="joe", password="secret"),
    ),
    (
        "rediss+sentinel://joe:p@a:1/2?addr=b:2&addr=c:3&sentinel_master_name=m&sentinel_user=u&sentinel_password=w"
        "&sentinel_tls_enabled=1",
        RedisAddress(
            topology="sentinel",
            hosts=(("a", 1), ("b", 2), ("c", 3)),
            tls=True,
            user="joe",
            password="p",
            db=2,
            sentinel_master_name="m",
            sentinel_user="u",
            sentinel_password="w",
            sentinel_tls=True,
        ),
    ),
    ("redis+cluster://a:1?addr=[::2]:2", RedisAddress(topology="cluster", hosts=(("a", 1), ("::2", 2)))),
]


@pytest.mark.parametrize(("text", "expected"), FORMS, ids=[text for text, _ in FORMS])
def test_a_form_is_read(text: str, expected: RedisAddress) -> None:
    assert parse_address(text) == expected


def test_a_list_names_several_nodes() -> None:
    assert parse_list("a:1,[::2]:2", "cluster") == parse_address("redis+cluster://a:1?addr=[::2]:2")


MISTAKES = [
    ("redis.svc", "an address without a port; write host:6379"),
    ("redis://h", "an address without a port; write host:6379"),
    ("[::1]", "an address without a port"),
    ("h:0", "not a number from 1 to 65535"),
    ("h:\u0661", "not a number from 1 to 65535"),
    ("redis://h:6379x", "not a number from 1 to 65535"),
    (":6379", "no host name or IP address before the port"),
    ("::1:6379", "write an IPv6 address in brackets"),
    ("[h]:6379", "brackets around something other than an IPv6 address"),
    ("http://h:1", 'no address begins with "http://"; use redis'),
    ("redis://h:1/", "no number of a database behind the /"),
    ("redis://h:1/x", "no number of a database behind the /"),
    ("redis+cluster://h:1/1", "a Cluster has the database 0 only"),
    ("unix://run/redis.sock", "the path of a unix socket begins with /"),
    ("redis://h:1?addr=b:2", "addr in the address of one server"),
    ("redis+cluster://h:1?addr=b", "an address without a port"),
    ("redis://h:1?io_timeout=4", 'io_timeout of an address: expected a duration above 0, such as "4s"; correct it'),
    ("redis://h:1?io_timeout=0", "io_timeout of an address: expected a duration above 0"),
    ("redis://h:1?tls_enabled=maybe", "tls_enabled of an address: expected true or false"),
    ("redis://h:1?io_timout=4s", 'unknown parameter "io_timout" of an address; did you mean io_timeout?'),
    ("redis://h:1?zz", 'unknown parameter "zz" of an address; remove it'),
    ("redis://h:1?force_resp2=true", "force_resp2: a parameter of Centrifugo that realtime does not support"),
    ("redis://h:1?sentinel_user=u", "sentinel_user in an address without Sentinels; use redis+sentinel://"),
    ("redis://h :1", "a space or a control character"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_is_one_line_with_the_remedy(text: str, message: str) -> None:
    line = problem(f"[engine.redis]\naddress = '{text}'")
    assert line.startswith("realtime.toml:2: engine.redis.address: ")
    assert message in line


def test_a_mistake_shows_no_credentials() -> None:
    for text in ("redis://joe:secret@h", "redis://joe:secret@h:1?x=secret2", "secret", "redis://h:1?io_timeout=secret"):
        assert "secret" not in problem(f"engine.redis.address = '{text}'").replace('"x"', "")


def test_lists_of_nodes_take_no_urls() -> None:
    for key in ("cluster_address", "sentinel_address"):
        line = problem(f"[engine.redis]\n{key} = 'redis://a:1'")
        assert line.startswith(f"realtime.toml:2: engine.redis.{key}: ")


def test_a_cluster_wins_over_sentinels_and_these_over_addresses() -> None:
    sentinels = "engine.redis.sentinel_address = ['a:1,b:1', 'c:1']\nengine.redis.sentinel_master_name = 'm'"
    cluster = "engine.redis.cluster_address = 'd:1'"
    for text, expected in (
        ("", ["127.0.0.1:6379"]),
        (sentinels, ["a:1,b:1", "c:1"]),
        (f"{sentinels}\n{cluster}", ["d:1"]),
    ):
        assert [address.name for address in addresses_in_use(parse_file(text).engine.redis)] == expected


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
hosts = st.tuples(
    st.from_regex(r"[a-z0-9_]([a-z0-9_.-]{0,10}[a-z0-9_])?", fullmatch=True) | st.ip_addresses().map(str),
    st.integers(1, 65535),
)


def written(host: tuple[str, int]) -> str:
    return f"[{host[0]}]:{host[1]}" if ":" in host[0] else f"{host[0]}:{host[1]}"


@given(
    hosts=st.lists(hosts, min_size=1, max_size=3), user=names, password=names, db=st.integers(0, 99999), master=names
)
def test_what_is_written_is_read(hosts: list[tuple[str, int]], user: str, password: str, db: int, master: str) -> None:
    more = "".join(f"&addr={quote(written(host), safe='')}" for host in hosts[1:])
    text = (
        f"redis+sentinel://{quote(user, safe='')}:{quote(password, safe='')}@{written(hosts[0])}/{db}"
        f"?sentinel_master_name={quote(master, safe='')}{more}"
    )
    assert parse_address(text) == RedisAddress(
        topology="sentinel", hosts=tuple(hosts), user=user, password=password, db=db, sentinel_master_name=master
    )


@given(st.text(max_size=60) | st.from_regex(r"(redis|rediss|unix|redis\+cluster|tcp)://.{0,40}", fullmatch=True))
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueRefused as refused:
        assert str(refused).isprintable()
    else:
        assert address.path or all(host and 0 < port < 65536 for host, port in address.hosts)
