"""The names of scripts."""

from __future__ import annotations

from realtime.redis.scripts import Script


def test_a_script_has_the_name_that_redis_gives_it() -> None:
    # By SCRIPT LOAD "return 1".
    assert Script("return 1").sha == b"e0e1f9fabfc9d4800c877a703b823ac0578ff8db"
