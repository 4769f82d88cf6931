"""The string that tells whether processes of two versions understand each other."""

from __future__ import annotations

import subprocess
import sys

from msgspec import defstruct

from realtime.worker.formats import describe, formats


def test_every_process_of_a_version_gives_the_same() -> None:
    code = "from realtime.worker.formats import formats; print(formats())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == formats()


def test_a_field_more_gives_another_also_in_a_type_inside() -> None:
    def described(**fields: type) -> str:
        inner = defstruct("Inner", list(fields.items()))
        return describe([defstruct("Outer", [("inner", list[inner])])])  # type: ignore[valid-type]

    assert described(number=int) == described(number=int)
    assert described(number=int) != described(number=int, text=str)
    assert described(number=int) != described(number=str)
