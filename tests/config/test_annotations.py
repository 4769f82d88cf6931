"""The vocabulary of field annotations, as the schema reads it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from realtime.config.annotations import Seconds, Secret, URLPath, WholeSeconds, about, restricted
from realtime.config.schema import keys_of
from realtime.config.values import URL_PATH


class Annotations(Struct):
    delay: Annotated[Seconds, about("A delay.")] = 1.0
    ttl: WholeSeconds = 1.0
    even: Annotated[int, restricted("an even number", lambda value: value % 2 == 0), about("A number.")] = 2
    key: Secret = ""
    path: URLPath = "/"


def test_a_key_has_the_help_text_limits_and_check_of_its_annotation() -> None:
    keys = keys_of(Annotations)
    assert keys["delay"].help == "A delay."
    assert not keys["delay"].accepts(-1.0)
    assert [keys["ttl"].accepts(seconds) for seconds in (2.0, 1.5)] == [True, False]
    assert (keys["even"].expected, keys["even"].help) == ("an even number", "A number.")
    assert [keys["even"].accepts(number) for number in (4, 3)] == [True, False]
    assert keys["key"].is_secret
    assert keys["path"].value_type is URL_PATH
