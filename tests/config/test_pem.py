"""PEM text in its three forms."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from realtime.config.pem import read_pem
from realtime.errors import SettingsError

PEM = "-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n"


def test_text_base64_and_a_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.pem"
    file.write_text(PEM)
    encoded = base64.b64encode(PEM.encode()).decode()
    for value in (PEM, encoded, f"{encoded[:20]}\n{encoded[20:]}", str(file)):
        assert read_pem("key", value) == PEM.encode()


@pytest.mark.parametrize("value", ["missing.pem", "/", "a\0b", base64.b64encode(b"no PEM").decode(), json.__file__])
def test_another_value_is_refused_in_one_line_that_does_not_show_it(value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_pem("engine.redis.tls.key_pem", value)
    [line] = caught.value.problems
    assert line.startswith("engine.redis.tls.key_pem: ")
    assert line.isprintable() and (value == "/" or value not in line)
