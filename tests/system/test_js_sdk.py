"""The official JavaScript SDK, unmodified, on Node against a real server with two workers."""

from __future__ import annotations

import time

import jwt
import pytest

from tests.system.serving import Server, run_node

pytestmark = pytest.mark.node


def token(key: str = "secret", **claims: object) -> str:
    return jwt.encode(claims, key, algorithm="HS256")


def test_every_command_does_what_the_sdk_expects(server: Server) -> None:
    server.expect_traceback()
    seen = run_node("basics.mjs", server.endpoint)

    assert seen["client"]
    assert set(seen["contextData"]) == {"pid"}
    assert seen["subscribed"]["recoverable"] and seen["subscribed"]["positioned"]
    assert seen["subscribed"]["streamPosition"]["epoch"]
    assert seen["joins"] == ["ada", "bob"]
    assert seen["leaves"] == ["bob"]
    assert seen["publications"] == [
        {
            "offset": 1,
            "data": {"text": "hello", "list": [1, 2.5, None], "deep": {"ключ": "値"}},
            "user": "ada",
            "nick": "Ada",
        },
        {"offset": 2, "data": "plain", "user": "bob", "nick": None},
        {"offset": 3, "data": "by the app", "user": None, "nick": None},
        {"offset": 4, "data": "after the leave", "user": "ada", "nick": "Ada"},
    ]
    assert seen["heardElsewhere"] == [1, 2, 3]
    assert seen["presence"] == ["ada", "bob"]
    assert seen["stats"] == [2, 2]
    assert seen["alone"] == [1, 1]
    assert seen["history"] == [1, 2]
    assert seen["newest"] == [2]
    assert seen["since"] == [2]
    assert seen["position"] == [0, 2, True]
    assert seen["echoed"] == {"a": [1, {"b": "ü"}]}
    assert seen["threaded"]["user"] == "ada"
    assert seen["published"] == {"offset": 3}
    assert seen["afterErrors"] == "still here"
    assert seen["moderated"] == {"by": "ada", "said": "fine"}


def test_errors_reach_the_caller_and_the_connection_lives(server: Server) -> None:
    server.expect_traceback()
    errors = run_node("basics.mjs", server.endpoint)["errors"]

    assert errors == {
        "failing": {"code": 100, "message": "internal server error", "temporary": True},
        "refusing": {"code": 1234, "message": "refused on purpose", "temporary": False},
        "missing": {"code": 104, "message": "method not found", "temporary": False},
        "publishing": {"code": 103, "message": "permission denied", "temporary": False},
        "namespace": {"code": 102, "message": "unknown channel", "temporary": False},
        "moderated": {"code": 451, "message": "not that word", "temporary": False},
    }
    assert server.log.count("RuntimeError: this handler fails on purpose") == 1


def test_tokens_let_in_refuse_and_renew(server: Server) -> None:
    now = int(time.time())
    tokens = {
        "good": token(sub="42"),
        "wrong": token(key="another secret", sub="42"),
        "expired": token(sub="42", exp=now - 60),
        "brief": token(sub="7", exp=now + 3),
        "renewed": token(sub="7", exp=now + 3600),
        "subscription": token(sub="42", channel="$private"),
        "foreign": token(key="another secret", sub="42", channel="$other"),
    }
    seen = run_node("tokens.mjs", server.endpoint, tokens)

    assert seen["user"] == "42"
    assert seen["subscriptions"] == 1
    assert seen["wrong"] == {"code": 3500, "reason": "invalid token"}
    assert seen["none"] == {"code": 4321, "reason": "not today"}
    assert seen["refusedChannel"] == {"code": 103, "reason": "permission denied"}
    assert (seen["lateState"], seen["asked"]) == ("connected", 1)
    assert seen["renewals"] == 1 and seen["kept"]


def test_a_client_with_many_subscriptions_by_token_comes_back(server: Server) -> None:
    tokens = {f"${number}": token(sub="42", channel=f"${number}", info="x" * 450) for number in range(120)}
    assert sum(map(len, tokens.values())) > 65536
    assert run_node("many.mjs", server.endpoint, server.port, token(sub="42"), tokens) == {"final": "", "again": 120}


@pytest.mark.parametrize("missed", [0, 1, 250])
def test_a_client_that_was_cut_off_recovers_exactly_what_it_missed(server: Server, missed: int) -> None:
    seen = run_node("recovery.mjs", server.endpoint, server.port, 5, missed, 5)

    assert seen == {
        "heard": 10 + missed,
        "disorder": "",
        "wasRecovering": True,
        "recovered": True,
        "subscribedTimes": 2,
    }
